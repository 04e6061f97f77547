from __future__ import annotations

from pathlib import Path

import pytest

from edge_slm.journal import Journal
from edge_slm_runtime.errors import DataError


def test_rows_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rows.jsonl"
    with Journal(path) as journal:
        journal.begin({"seed": 1})
        journal.append({"text": "früh"})
        journal.sync()
        assert journal.count == 2
    with Journal(path) as journal:
        assert list(journal.rows()) == [{"seed": 1}, {"text": "früh"}]
        journal.begin({"seed": 1})
        with pytest.raises(DataError, match="begun with another seed"):
            journal.begin({"seed": 2})


@pytest.mark.parametrize("tail", [b'{"a": ', b'{"a": 1}', b"\0" * 30, b"[1]\n", b'x\n{"a": 1}\n'])
@pytest.mark.parametrize(("group", "kept"), [(1, 5), (2, 4), (8, 0)])
def test_what_is_incomplete_is_cut_off(tail: bytes, group: int, kept: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    whole = b"".join(b'{"row": %d}\n' % i for i in range(5))
    path.write_bytes(whole + tail)
    with Journal(path, group) as journal:
        assert journal.count == kept
        journal.append({"row": kept})
    lines = [*whole.splitlines(keepends=True)[:kept], b'{"row": %d}\n' % kept]
    assert path.read_bytes() == b"".join(lines)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows"), pytest.raises(DataError, match="another process is writing"):
        Journal(tmp_path / "rows")
    Journal(tmp_path / "rows").close()
