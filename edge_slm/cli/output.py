"""An output file that a run continues after a crash.

OUTPUT.run.json   all that the answers depend on (input digest, bundle digest, settings);
                  written first and kept, so that starting again is harmless
OUTPUT.part       the answers so far, in input order, a journal
OUTPUT            the part, renamed once it is complete
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_slm.journal import Journal
from edge_slm_runtime.errors import DataError, TargetExists
from edge_slm_runtime.files import write_json


class ResumableOutput:
    """The answers of one run: `count` of them are on disk, all of them when `complete`.

    group: answers that are computed together; whole groups are kept when a run starts
    again. Raises TargetExists when OUTPUT is not of such a run, DataError when it was begun
    with other input or settings, or when another process is writing it.
    """

    def __init__(self, output: Path, record: Mapping[str, Any], group: int) -> None:
        self._output, self._group = output, group
        self._part = output.with_name(output.name + ".part")
        self._begin(json.loads(json.dumps(record)))  # as it will be read back
        self.complete = output.exists()
        self._journal = None if self.complete else Journal(self._part, group)
        self.count = self._journal.count if self._journal else 0

    def append(self, answer: Mapping[str, Any]) -> None:
        """Adds an answer; it survives a power cut when its group is complete."""
        assert self._journal is not None, "the output is complete or closed"
        self._journal.append(answer)
        self.count += 1
        if self.count % self._group == 0:
            self._journal.sync()

    def finish(self) -> None:
        """Gives the complete output its name."""
        assert self._journal is not None, "the output is complete or closed"
        self._journal.sync()
        self._part.rename(self._output)
        self.close()
        self.complete = True

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, record: Mapping[str, Any]) -> None:
        path = self._output.with_name(self._output.name + ".run.json")
        start_afresh = f"give another output, or remove {self._output.name}*"
        if not path.exists():
            for other in (self._output, self._part):
                if other.exists():
                    raise TargetExists(f"{other} exists already", start_afresh)
            write_json(record, path)
            return
        before = _read_record(path)
        if changed := [key for key in record if before.get(key) != record[key]]:
            what = ", ".join(f"{k}: {before.get(k)!r} → {record[k]!r}" for k in changed)
            raise DataError(f"{self._output} was begun with something else ({what})", start_afresh)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{path} is not the record of a run", "remove it or give another output")
    return record
