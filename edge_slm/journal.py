"""A file of JSON rows that a run appends to and continues after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from edge_slm_runtime.errors import DataError
from edge_slm_runtime.files import open_locked


class Journal:
    """An append-only JSONL file with one writer; `count` rows were complete or are since.

    group: rows that are computed together. Opening keeps the whole groups of complete rows
    and cuts off the rest, so that a continued run computes each group as an undisturbed one
    would have. Raises DataError when another process is writing the file.
    """

    def __init__(self, path: Path, group: int = 1) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: BinaryIO = open_locked(path)
        try:
            self.count = self._keep_whole_groups(group)
        except BaseException:
            self.close()
            raise

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the file, from the first one on."""
        with self.path.open("rb") as file:
            yield from map(json.loads, file)

    def begin(self, record: Mapping[str, Any]) -> None:
        """Makes `record`, all that the rows depend on, the first row of an empty journal.

        Raises DataError when the journal was begun with another record.
        """
        if not self.count:
            self.append(record)
            return
        before = next(self.rows())
        if changed := [key for key in record if before.get(key) != record[key]]:
            raise DataError(
                f"{self.path} was begun with another {', '.join(changed)}",
                "remove it to start afresh",
            )

    def append(self, row: Mapping[str, Any]) -> bytes:
        """The row survives the end of this process; after `sync`, a power cut too. Returns it
        as it is written."""
        text = json.dumps(row, ensure_ascii=False)
        line = text.encode("utf-8", "backslashreplace") + b"\n"  # halves of characters
        self._file.write(line)
        self._file.flush()
        self.count += 1
        return line

    def sync(self) -> None:
        """Flushes all rows to the disk."""
        os.fsync(self._file.fileno())

    def cut(self, count: int) -> None:
        """Keeps the first `count` rows."""
        self._file.seek(0)
        end = sum(len(self._file.readline()) for _ in range(count))
        self._file.truncate(end)
        self.count = count

    def close(self) -> None:
        self._file.close()

    def _keep_whole_groups(self, group: int) -> int:
        rows = count = end = offset = 0
        self._file.seek(0)
        for line in self._file:
            if not _is_complete(line):
                break
            rows, offset = rows + 1, offset + len(line)
            if rows % group == 0:
                count, end = rows, offset
        self._file.truncate(end)
        return count

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_complete(line: bytes) -> bool:
    """False for a partly written row, and for the zeros that a power cut may leave."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False
