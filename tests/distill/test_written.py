"""The prompts in recipes/written: what of their rules a program can check."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from edge_slm.distill.evaluate.faults import quoted, repeats, unfinished
from edge_slm.distill.samples import read_samples
from edge_slm_runtime.keywords import coverage

FOLDER = Path(__file__).parents[2] / "recipes/written"
FILES = sorted(FOLDER.rglob("*.jsonl"))
WORDS = {
    "image": (10, 75),
    "video": (15, 90),
    "design": (25, 85),
    "lettering": (12, 55),
    "scene": (6, 20),
    "tags": (3, 14),
}
WORN = re.compile(
    r"(?i)\b(vibrant|serene|majestic|breathtaking|stunning|mesmeri\w+|whimsical|intricate\w*|"
    r"bathed in|set against|testament|captivating|showcas\w+|masterpiece|trending|evok\w+)\b"
)


def opening(text: str) -> str:
    return " ".join(text.lower().split()[:3])


def test_there_are_some_for_each_task() -> None:
    assert {file.stem for file in FILES if file.parent == FOLDER} == set(WORDS)


def test_no_request_comes_twice() -> None:
    asked = [
        (row["task"], row["request"].lower())
        for file in FILES
        for row in map(json.loads, file.read_text("utf-8").splitlines())
    ]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_they_keep_the_rules(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    task, (least, most) = file.stem, WORDS[file.stem]
    assert len({row["response"] for row in rows}) == len(rows)
    for row in rows:
        asked, text = row["request"], row["response"]
        assert row["task"] == task
        items = text.split(", ") if task == "tags" else text.split()
        assert least <= len(items) <= most, row
        assert not WORN.search(text), row
        if task == "tags":
            assert len(set(items)) == len(items), row
            continue
        assert not unfinished(text), row
        assert text[-1] in '.!?"', row
        if task == "lettering":
            assert quoted(asked, text), row
            assert text.count('"') == 2, row
        else:
            assert not repeats(text), row
            assert '"' in asked or '"' not in text, row
    if task not in ("lettering", "tags"):
        kept = [coverage(row["request"], row["response"]) for row in rows]
        assert sum(kept) / len(kept) > 0.93
    if task in ("image", "video"):
        openings = Counter(opening(row["response"]) for row in rows)
        openings -= Counter(opening(row["request"]) for row in rows)
        assert openings.most_common(1)[0][1] < len(rows) / 20
    assert len([*read_samples([file])]) > 0.98 * len(rows)  # usable for training
