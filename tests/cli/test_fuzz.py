"""Damaged records of a batch: it continues to the same output, or says that it cannot."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import bytes_damaged, fuzz, tried

from edge_slm.cli.output import ResumableOutput
from edge_slm.journal import Journal
from edge_slm_runtime.errors import EdgeSlmError

ROWS = [{"id": i, "text": f"a fox, number {i} 🦊 " * (i % 4)} for i in range(40)]
RECORD = {"input_sha256": "0" * 64, "bundle": "1" * 64, "seed": 7, "temperature": 0.5}
GROUP = 8


def write(output: Path, count: int = len(ROWS)) -> None:
    """As many answers as a run gives before it is killed; the whole ones are given their name."""
    with ResumableOutput(output, RECORD, GROUP) as part:
        for row in [] if part.complete else ROWS[part.count : count]:
            part.append(row)
        if part.count == len(ROWS) and not part.complete:
            part.finish()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "out"
    write(output)
    return output.read_bytes()


@fuzz("batch", 300)
def test_any_damage_to_the_files_of_a_batch(tmp_path: Path, whole: bytes, seed: str) -> str:
    choice, output = random.Random(seed), tmp_path / "run/out"
    write(output, choice.choice([0, 3, GROUP, 21, 39, len(ROWS)]))
    for _ in range(choice.choice([1, 1, 2])):
        there = sorted(path for path in output.parent.iterdir() if path.is_file())
        file, content = choice.choice(there), b""
        kind = choice.randrange(8)
        if kind < 4:
            content = bytes_damaged(choice, file.read_bytes())
        elif kind == 4:
            content = file.read_bytes() + choice.choice([bytes(500), b"{}\n", b"null\n", b"["])
        elif kind == 5:
            content = choice.choice(there).read_bytes()
        if kind == 6:
            file.unlink()
            if choice.random() < 0.3:
                file.mkdir()
        else:
            file.write_bytes(tried(file.name, content))
    try:
        write(output)
    except (EdgeSlmError, OSError) as error:
        return type(error).__name__
    else:
        assert output.read_bytes() == whole
        return ""
    finally:
        shutil.rmtree(output.parent)


@fuzz("journal", 300)
def test_any_journal(tmp_path: Path, seed: str) -> str:
    """Whole groups of rows at its beginning are kept, and more can be appended."""
    choice, path = random.Random(seed), tmp_path / "journal"
    path.unlink(missing_ok=True)
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    path.write_bytes(tried("journal", bytes_damaged(choice, b"".join(lines))))
    with Journal(path, GROUP) as journal:
        kept = journal.count
        assert kept % GROUP == 0
        journal.append({"id": "more"})
        rows: list[Any] = list(journal.rows())
    assert len(rows) == kept + 1
    assert rows[-1] == {"id": "more"}
    assert all(isinstance(row, dict) for row in rows)
    return ""
