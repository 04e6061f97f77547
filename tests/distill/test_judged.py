"""The judged answers of `recipes/judged`, and the recipes that learn from them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from edge_slm.distill.cuts import sentence_ends
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.samples import read_jsonl
from edge_slm.distill.split import held_out

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("part", [".", "second", "third", "fourth", "fifth", "sixth", "seventh"])
def test_answers_are_judged_one_way_or_the_other(part: str) -> None:
    rows = list(read_jsonl([RECIPES / "judged" / part]))
    tasks = Recipe.read(RECIPES / "m-judged.toml").data.tasks
    assert {row.task for row in rows} == {*tasks}
    for task in tasks:
        judged = Counter(row.quality for row in rows if row.task == task)
        assert {*judged} == {0.25, 1.0}
        assert 0.1 < judged[1.0] / judged.total() < 0.9
    assert not any(held_out(row.request or "", 6) for row in rows)  # figures are of those


def test_the_highest_level_is_what_a_reader_would_paste() -> None:
    names = [path.stem for pattern in ("m-judged*", "m-pref*") for path in RECIPES.glob(pattern)]
    assert len(names) == 9
    for name in names:
        recipe = Recipe.read(RECIPES / f"{name}.toml")
        assert 0.25 < recipe.hindsight.top < 0.5
        assert recipe.train.confidence > 0
        assert recipe.data.restated == ("image", "video", "design")
        assert (recipe.train.preference > 0) == name.startswith("m-pref")


@pytest.mark.parametrize("part", ["fifth", "sixth", "seventh"])
def test_a_fault_is_a_sentence(part: str) -> None:
    faults = 0
    for row in read_jsonl([RECIPES / "judged" / part]):
        starts = [0, *sentence_ends(row.response)]
        sentences = [row.response[a:b].strip() for a, b in pairwise(starts)]
        assert row.fault in ("", *sentences)
        faults += row.fault != ""
    assert faults > 1700


@pytest.mark.parametrize("part", ["third", "fourth", "fifth", "sixth", "seventh"])
def test_most_requests_have_answers_to_compare(part: str) -> None:
    judged: dict[tuple[str, str], set[float]] = {}
    for row in read_jsonl([RECIPES / "judged" / part]):
        judged.setdefault((row.task, row.request or ""), set()).add(row.quality)
    assert sum(len(found) == 2 for found in judged.values()) > len(judged) / 2
