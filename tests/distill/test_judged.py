"""The judged answers of `recipes/judged`, and the recipes that learn from them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from edge_slm.distill.recipe import Recipe
from edge_slm.distill.samples import read_jsonl
from edge_slm.distill.split import held_out

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("folder", [RECIPES / "judged", RECIPES / "judged" / "second"])
def test_answers_are_judged_one_way_or_the_other(folder: Path) -> None:
    rows = list(read_jsonl([folder]))
    tasks = Recipe.read(RECIPES / "m-judged.toml").data.tasks
    assert {row.task for row in rows} == {*tasks}
    for task in tasks:
        judged = Counter(row.quality for row in rows if row.task == task)
        assert {*judged} == {0.25, 1.0}
        assert 0.1 < judged[1.0] / judged.total() < 0.9
    assert not any(held_out(row.request or "", 6) for row in rows)  # figures are of those


def test_the_highest_level_is_what_a_reader_would_paste() -> None:
    for name in ("m-judged", "m-judged-2", "m-judged-3"):
        recipe = Recipe.read(RECIPES / f"{name}.toml")
        assert 0.25 < recipe.hindsight.top < 0.5
        assert recipe.train.confidence > 0
        assert recipe.data.restated == ("image", "video", "design")
