"""An output file that a run continues after a crash.

OUTPUT.run.json     all that the answers depend on (input digest, bundle digest, settings), and
                    in the end size and sha256 of the output; kept, so that starting again is
                    harmless
OUTPUT.part         the answers so far, in input order, a journal
OUTPUT.part.sums    the sha256 of each group of them
OUTPUT              the part, renamed once it is complete

Whoever has locked the part may look at the others and change them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from edge_slm.journal import Journal
from edge_slm_runtime.bundle import file_entry
from edge_slm_runtime.errors import DataError, TargetExists
from edge_slm_runtime.files import write_json


class ResumableOutput:
    """The answers of one run: `count` of them are on disk, all of them when `complete`.

    group: answers that are computed together; whole groups are kept when a run starts
    again. Raises TargetExists when OUTPUT is not of such a run, DataError when it was begun
    with other input or settings, when it was changed afterwards, or when another process is
    writing it.
    """

    def __init__(self, output: Path, record: Mapping[str, Any], group: int) -> None:
        self._output, self._group = output, group
        self._part, self._sums = (_beside(output, end) for end in (".part", ".part.sums"))
        self._record_file = _beside(output, ".run.json")
        self._record = json.loads(json.dumps(record))  # as it will be read back
        self._digest = hashlib.sha256()  # of the group that is being written
        self._refuse_foreign()
        self._journal: Journal | None = Journal(self._part, group)
        self._sums_file: BinaryIO | None = None
        try:
            self.complete = self._begin()
            self.count = 0 if self.complete else self._keep_sound_groups()
        except BaseException:
            self._discard()
            raise
        if self.complete:
            self._discard()

    def append(self, answer: Mapping[str, Any]) -> None:
        """Adds an answer; it survives a power cut when its group is complete."""
        assert self._journal is not None, "the output is complete or closed"
        assert self._sums_file is not None
        self._digest.update(self._journal.append(answer))
        self.count += 1
        if self.count % self._group == 0:
            self._journal.sync()
            self._sums_file.write(self._digest.hexdigest().encode() + b"\n")
            self._sums_file.flush()
            self._digest = hashlib.sha256()

    def finish(self) -> None:
        """Gives the complete output its name."""
        assert self._journal is not None, "the output is complete or closed"
        self._journal.sync()
        entry = file_entry(self._part)
        write_json({**self._record, "output": [entry.size, entry.sha256]}, self._record_file)
        self._part.rename(self._output)
        self._sums.unlink(missing_ok=True)
        self.close()
        self.complete = True

    def close(self) -> None:
        for file in (self._sums_file, self._journal):
            if file is not None:
                file.close()
        self._journal = self._sums_file = None

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_foreign(self) -> None:
        """What is there without a record, which is written first, is of something else."""
        there = [p for p in (self._output, self._part) if p.exists() or p.is_symlink()]
        if there == [self._part] and self._part.is_file() and _is_empty(self._part):
            return  # another run has made it and is about to write its record
        if there and not self._record_file.exists():
            raise TargetExists(f"{there[0]} exists already", self._start_afresh)

    def _begin(self) -> bool:
        """Whether the output is complete already."""
        if not self._record_file.exists():
            write_json(self._record, self._record_file)
        before, record = _read_record(self._record_file), self._record
        if changed := [key for key in record if before.get(key) != record[key]]:
            what = ", ".join(f"{k}: {before.get(k)!r} → {record[k]!r}" for k in changed)
            raise DataError(
                f"{self._output} was begun with something else ({what})", self._start_afresh
            )
        there = self._output.exists() or self._output.is_symlink()
        if there and before.get("output", "none yet") != _facts(self._output):
            raise DataError(f"{self._output} was changed after it was written", self._start_afresh)
        return there

    @property
    def _start_afresh(self) -> str:
        files = (self._output, self._record_file, self._part, self._sums)
        ours = [file for file in files if file.is_file() and file != self._just_made()]
        there = " and ".join(file.name for file in ours)
        return f"give another output{there and f', or remove {there}'}"

    def _keep_sound_groups(self) -> int:
        """The answers of the groups at the beginning whose sums fit; the rest is cut off."""
        assert self._journal is not None
        self._sums_file = self._sums.open("ab+")
        self._sums_file.seek(0)
        sound = 0
        with self._part.open("rb") as part:
            for line in self._sums_file.read().splitlines():
                rows = list(islice(part, self._group))
                found = hashlib.sha256(b"".join(rows)).hexdigest().encode()
                if len(rows) < self._group or found != line:
                    break
                sound += 1
        self._journal.cut(sound * self._group)
        self._sums_file.truncate(sound * (2 * self._digest.digest_size + 1))
        return self._journal.count

    def _just_made(self) -> Path | None:
        """The part, when it was only made to be locked."""
        return self._part if self._part.exists() and _is_empty(self._part) else None

    def _discard(self) -> None:
        try:
            if self._just_made():
                self._part.unlink()
                self._sums.unlink(missing_ok=True)  # it may be a folder
        finally:
            self.close()


def complete_output(output: Path) -> str:
    """The sha256 of an output that a run has completed. Raises DataError when it is not
    complete, or was changed since."""
    record_file, facts = _beside(output, ".run.json"), _facts(output)
    moving = _beside(output.with_name(f"{output.name}.retry"), ".run.json")
    if moving.exists() and facts is not None and _read_record(moving).get("output") == facts:
        moving.replace(record_file)  # `put_in_place` was stopped between its two steps
    record = _read_record(record_file) if record_file.exists() else {}
    if facts is None or "output" not in record:
        raise DataError(f"{output} is no complete output of a batch", "complete it first")
    if record["output"] != facts:
        raise DataError(f"{output} was changed after it was written", "give another output")
    return str(facts[1])


def put_in_place(retried: Path, output: Path) -> None:
    """The complete output `retried` takes the place of `output`, with its record."""
    retried.replace(output)
    _beside(retried, ".run.json").replace(_beside(output, ".run.json"))


def _beside(output: Path, end: str) -> Path:
    return output.with_name(output.name + end)


def _is_empty(path: Path) -> bool:
    return path.stat().st_size == 0


def _facts(output: Path) -> list[Any] | None:
    """Size and sha256; None of what is no file."""
    if not output.is_file():
        return None
    entry = file_entry(output)
    return [entry.size, entry.sha256]


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{path} is not the record of a run", "remove it or give another output")
    return record
