"""An output file that survives the death of its writer at any moment.

    OUTPUT.run.json   what the run is (input digest, bundle digest, settings); written
                      first, kept afterwards, so that starting again is harmless
    OUTPUT.part       the lines so far, in input order, append-only
    OUTPUT            the part, renamed once it is complete

A run that starts again keeps the complete lines, drops a torn tail, and goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from edge_slm_runtime.errors import DataError, TargetExists


class Journal:
    """The lines of one run; `lines` of them are on disk already, `complete` if all are.

    group: lines come in groups of this size, computed together; only whole groups
    are kept when a run starts again, so that each is computed just as it would
    have been without the interruption.

    Raises TargetExists when OUTPUT is not of such a run, DataError when it was begun
    with other input or settings, or when another process is writing it.
    """

    def __init__(self, output: Path, record: Mapping[str, Any], group: int) -> None:
        record = json.loads(json.dumps(record))  # as it will be read back
        self._output = output
        self._part = output.with_name(output.name + ".part")
        self._record = output.with_name(output.name + ".run.json")
        self._file: BinaryIO | None = None
        self._group = group
        self.lines = 0
        self._begin(record)
        self.complete = output.exists()
        if not self.complete:
            self._file = self._part.open("ab+")
            try:
                _lock(self._file, output)
                self.lines = self._keep_whole_groups()
            except BaseException:
                self.close()
                raise

    def append(self, line: str) -> None:
        """Adds a line (without newline); it is durable when its group is complete."""
        assert self._file is not None, "the journal is complete or closed"
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self.lines += 1
        if self.lines % self._group == 0:
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Gives the complete output its name."""
        assert self._file is not None, "the journal is complete or closed"
        _flush(self._file)
        self._part.rename(self._output)
        _flush_folder(self._output.parent)
        self.close()
        self.complete = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, record: Mapping[str, Any]) -> None:
        started_afresh = f"give another output, or remove {self._output.name}*"
        if self._record.exists():
            before = _read_record(self._record)
            if changed := [key for key in record if before.get(key) != record[key]]:
                what = ", ".join(f"{k}: {before.get(k)!r} → {record[k]!r}" for k in changed)
                raise DataError(
                    f"{self._output} was begun with something else ({what})", started_afresh
                )
            return
        for path in (self._output, self._part):
            if path.exists():
                raise TargetExists(f"{path} exists already", started_afresh)
        temporary = self._record.with_name(f"{self._record.name}.new")
        with temporary.open("wb") as file:
            file.write(json.dumps(record, ensure_ascii=False, indent=2).encode() + b"\n")
            _flush(file)
        temporary.rename(self._record)
        _flush_folder(self._record.parent)

    def _keep_whole_groups(self) -> int:
        assert self._file is not None
        self._file.seek(0)
        lines = size = kept = offset = 0
        for line in self._file:
            if not _is_whole(line):
                break
            lines, offset = lines + 1, offset + len(line)
            if lines % self._group == 0:
                kept, size = lines, offset
        self._file.truncate(size)
        return kept


def _is_whole(line: bytes) -> bool:
    """False for a torn line, and for what a power cut may leave behind (zeros)."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{path} is not the record of a run", "remove it or give another output")
    return record


def _lock(file: BinaryIO, output: Path) -> None:
    """Two writers would interleave their lines; the kernel drops the lock of a dead one."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process is writing {output}", "wait for it to end") from None


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable (POSIX; elsewhere the rename must do)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
