from __future__ import annotations

from pathlib import Path

import pytest

from edge_slm.distill.recipe import Recipe
from edge_slm_runtime.errors import DataError

SMALL = '[data]\ntasks = ["image"]\n[train]\ntokens = 10_000\n'


def test_the_committed_recipe_is_valid() -> None:
    recipe = Recipe.read(Path(__file__).parents[2] / "recipes" / "reference.toml")
    assert recipe.model.width % recipe.model.heads == 0


def test_the_digest_is_of_the_settings_not_of_the_file(tmp_path: Path) -> None:
    one, two, three = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    one.write_text(SMALL, "utf-8")
    two.write_text("# remark\nseed = 0\n" + SMALL, "utf-8")
    three.write_text("seed = 1\n" + SMALL, "utf-8")
    a, b, c = (Recipe.read(path).digest() for path in (one, two, three))
    assert a == b != c


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks = [", "not TOML"),
        ('[data]\ntasks = ["image"]\n', "train: Field required"),
        (SMALL + "speed = 3\n", r"train\.speed: Extra inputs are not permitted"),
        (SMALL.replace("10_000", "4096") + "learning_rate = inf\n", r"learning_rate: .* finite"),
        (SMALL.replace('"image"', '"image", "image"'), "must be different names"),
        (SMALL.replace('"image"', '"any"'), "none of them 'any'"),
        (SMALL.replace('"image"', '"im age"'), r"data\.tasks\.0: String should match"),
        (SMALL.replace("[train]", "max_rows = { tags = 3 }\n[train]"), "settings for 'tags'"),
        (SMALL.replace("[train]", "max_rows = { image = 0 }\n[train]"), "max_rows"),
        (SMALL + "[model]\nheads = 5\n", "multiple of model.heads"),
        (SMALL.replace("10_000", "100"), "train.tokens"),
        (SMALL.replace("10_000", "-1"), r"train\.tokens: Input should be greater than 0"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=message):
        Recipe.read(path)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read recipe"):
        Recipe.read(tmp_path / "none.toml")
