"""What `make fuzz` counts, by damaged files whose fate is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from damage import fuzz, tried
from fuzz import read_counts, table_of
from isolation import Crash, Hang
from rich.console import Console


def fate(seed: str) -> str:
    number = int(seed.rpartition("/")[2])
    tried("a/file.json", seed.encode())
    if error := {3: Crash("ended with -11"), 5: Hang("no answer"), 7: ValueError("x")}.get(number):
        raise error
    return "file_altered" if number % 2 else ""


def test_every_failure_is_counted_and_its_file_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, kept = tmp_path / "counts", tmp_path / "kept"
    settings = {"SEED": "11", "FILES": "other=5,some=12", "COUNTS": str(counts), "KEPT": str(kept)}
    for name, value in settings.items():
        monkeypatch.setenv(f"FUZZ_{name}", value)
    with pytest.raises(AssertionError) as failure:
        fuzz("some", 3)(fate)()
    told = str(failure.value).splitlines()
    assert len(told) == 3
    assert told[0].startswith("file 3 of seed 11 (crashes), kept ")
    assert "ValueError: x" in told[2]
    files = {path.name: path.read_text() for path in kept.iterdir()}
    assert files == {f"some-11-{n}-file.json": f"11/some/{n}" for n in (3, 5, 7)}
    row = json.loads(counts.read_text())
    failures = {"crashes": 1, "hangs": 1, "raw errors": 1}
    assert row == {"kind": "some", "read": 6, "refused": 3, **failures}
    counts.write_text(2 * counts.read_text())  # two rounds
    with (console := Console(width=100)).capture() as capture:
        console.print(table_of(read_counts(counts)))
    line = next(line for line in capture.get().splitlines() if "some" in line)
    assert line.replace("│", " ").split() == ["some", "24", "12", "6", "2", "2", "2"]


def test_without_settings_the_same_few_files_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEED", "FILES", "COUNTS", "KEPT"):
        monkeypatch.delenv(f"FUZZ_{name}", raising=False)
    seeds: list[str] = []

    def test(seed: str) -> str:
        seeds.append(seed)
        return ""

    fuzz("some", 3)(test)()
    assert seeds == ["0/some/0", "0/some/1", "0/some/2"]
