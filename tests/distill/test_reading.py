"""Answers to grade by reading: the sheet is blind, and grades find their key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import edge_slm
from edge_slm.cli import main
from edge_slm.distill.evaluate import read_grades, write_sheet
from edge_slm.distill.samples import Sample
from edge_slm_bench.metrics.quality import wilson
from edge_slm_runtime.errors import DataError, TargetExists

SAMPLES = [
    Sample("a fox </script>", "a fox in the snow", "image"),
    Sample("an owl", "an owl at night", "image"),
    Sample("cats", "cat, pet", "tags"),
]
ANSWERS = {
    "model-x": {"a fox </script>": "a fox <b>runs</b>", "an owl": "an owl", "cats": "cats"},
    "references": {sample.request: sample.response for sample in SAMPLES},
}


@pytest.fixture
def sheet(tmp_path: Path) -> dict[str, Any]:
    return write_sheet(SAMPLES, ANSWERS, tmp_path / "reading.html")


def grade(written: dict[str, Any], folder: Path, **changes: Any) -> Path:
    """Grades that find the answers of model-x usable, but for the tags."""
    key = json.loads((folder / written["key"]).read_text("utf-8"))
    usable = {
        str(a["number"]): a["system"] == "model-x" and a["task"] != "tags" for a in key["answers"]
    }
    grades = {"sheet": written["sheet"], "key": written["key"], "usable": usable, **changes}
    path = folder / "reading.grades.json"
    path.write_text(json.dumps(grades), "utf-8")
    return path


def test_the_sheet_does_not_say_who_wrote_what(sheet: dict[str, Any], tmp_path: Path) -> None:
    page = (tmp_path / "reading.html").read_text("utf-8")
    assert "model-x" not in page + json.dumps(sheet)
    assert "http" not in page  # nothing is asked of a server
    (stored,) = re.findall(r'<script id="sheet"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert json.loads(stored) == sheet
    assert len(sheet["answers"]) == 6
    assert all(
        set(a) == {"number", "task", "request", "asked_words", "text"} for a in sheet["answers"]
    )
    again = write_sheet(SAMPLES, ANSWERS, tmp_path / "again.html")
    assert again["answers"] == sheet["answers"]
    with pytest.raises(TargetExists):
        write_sheet(SAMPLES, ANSWERS, tmp_path / "reading.html")


def test_grades_become_shares_of_systems_and_tasks(sheet: dict[str, Any], tmp_path: Path) -> None:
    found = read_grades(grade(sheet, tmp_path))
    assert (found["graded"], found["answers"], found["tasks"]) == (6, 6, ["image", "tags"])
    mine, references = found["systems"]["model-x"], found["systems"]["references"]
    assert mine["by_task"]["image"]["value"] == 1
    assert mine["by_task"]["tags"]["value"] == 0
    assert mine["all"]["value"] == pytest.approx(2 / 3)
    assert references["all"]["value"] == 0
    first = str(sheet["answers"][0]["number"])
    few = read_grades(grade(sheet, tmp_path, usable={first: True}))
    assert sum(part["all"]["n"] for part in few["systems"].values()) == 1
    printed = CliRunner().invoke(main, ["evaluate", "--grades", str(grade(sheet, tmp_path))])
    assert printed.exit_code == 0, printed.stderr
    assert "6 of 6 answers graded" in printed.stdout
    assert "67% [21, 94%]" in printed.stdout


def test_grades_that_cannot_be_read(sheet: dict[str, Any], tmp_path: Path) -> None:
    for changes, said in (
        ({"sheet": "other"}, "the key of another sheet"),
        ({"key": "nowhere.key.json"}, "is not beside"),
        ({"usable": {"99": True}}, "answer '99'"),
        ({"usable": {"1": "yes"}}, "answer '1'"),
        ({"usable": []}, "'usable' is missing or of another kind"),
    ):
        with pytest.raises(DataError, match=said):
            read_grades(grade(sheet, tmp_path, **changes))


def test_the_interval_of_a_share() -> None:
    # Wilson's score interval of 9 in 10, as in tables.
    share = wilson(9, 10)
    assert (share.low, share.high) == (
        pytest.approx(0.5958, abs=1e-4),
        pytest.approx(0.9821, abs=1e-4),
    )
    assert wilson(10, 10).low == pytest.approx(0.7225, abs=1e-4)
    assert wilson(0, 0).as_dict() == {"value": None, "low": None, "high": None, "n": 0}


@pytest.mark.slow
def test_a_sheet_of_a_bundle(tmp_path: Path) -> None:
    data = tmp_path / "samples.jsonl"
    rows = [
        {"request": f"a fox number {i}", "response": f"a fox number {i}, in snow", "task": "image"}
        for i in range(150)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    page = tmp_path / "sheet.html"
    arguments = ["evaluate", "--data", str(data), "--read", "6", "--html", str(page)]
    arguments += ["--bundle", str(edge_slm.shipped_bundle())]
    result = CliRunner().invoke(main, [*arguments, "--answers", f"file={data}", "--json"])
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["answers"]) == 6  # of three systems
    key = json.loads((tmp_path / "sheet.key.json").read_text("utf-8"))
    assert {a["system"] for a in key["answers"]} == {"edge-slm-reference", "references", "file"}
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 9
    few = CliRunner().invoke(main, [*arguments[:4], "2", "--answers", f"file={data}"])
    assert few.exit_code == 3
    assert "too few" in few.stderr


def test_a_sheet_needs_data() -> None:
    result = CliRunner().invoke(main, ["evaluate", "--read", "6"])
    assert result.exit_code == 2
    assert "Missing option '--data'" in result.stderr
