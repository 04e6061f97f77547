"""Rows of work done, one JSON object a line, that survive the death of their writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from edge_slm_runtime.errors import DataError

Row = dict[str, Any]


class Journal:
    """An append-only file; `rows` are those it held when it was opened.

    A torn last line, and all that stands after a torn one, is cut off. Raises
    DataError when another process has the file open. POSIX locks; elsewhere none.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab+")
        try:
            _lock(self._file, path)
            self.rows = self._read()
        except BaseException:
            self.close()
            raise

    def append(self, row: Row) -> None:
        """The row outlives this process from here on (not a power cut)."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> list[Row]:
        rows, size = [], 0
        self._file.seek(0)
        for line in self._file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(row, dict):
                break
            rows.append(row)
            size += len(line)
        self._file.truncate(size)
        return rows

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """The kernel drops the lock of a dead process."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process is writing {path}", "wait for it to end") from None
