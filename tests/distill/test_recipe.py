from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_slm.distill.recipe import ExploreRecipe, ModelRecipe, Recipe
from edge_slm_runtime.errors import DataError

SMALL = '[data]\ntasks = ["image"]\n[[stages]]\ntokens = 10_000\n'


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_committed_recipes_are_valid(path: Path) -> None:
    recipe = Recipe.read(path)
    assert recipe.plain().explore.rounds == 0


def test_the_plain_baseline_trains_on_as_many_tokens() -> None:
    recipe = Recipe.read(RECIPES[0]).model_copy(
        update={"explore": ExploreRecipe(rounds=2, tokens=50_000)}
    )
    before = sum(stage.tokens for stage in recipe.stages)
    assert sum(stage.tokens for stage in recipe.plain().stages) == before + 100_000
    assert recipe.plain().hindsight.plain


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
        ('[data]\ntasks = ["image"]\n', "stages: Field required"),
        (SMALL + "speed = 3\n", r"stages\.0\.speed: Extra inputs are not permitted"),
        (SMALL + "learning_rate = inf\n", r"learning_rate: .* finite"),
        (SMALL.replace('"image"', '"image", "image"'), "must be different names"),
        (SMALL.replace('"image"', '"any"'), "none of them 'any'"),
        (SMALL.replace('"image"', '"im age"'), r"data\.tasks\.0: String should match"),
        (SMALL.replace("[[stages]]", "max_rows = { tags = 3 }\n[[stages]]"), "settings for 'tags'"),
        (SMALL.replace("[[stages]]", "max_rows = { image = 0 }\n[[stages]]"), "max_rows"),
        (SMALL + "[model]\nheads = 5\n", "multiple of heads"),
        (SMALL + "[model]\nkv_heads = 4\n", "multiple of kv_heads"),
        (SMALL + "[model]\nkv_heads = 3\n", "a gpt2 has as many kv_heads as heads"),
        (SMALL + "[model]\narchitecture = 'llama'\nwidth = 18\n", "must be even"),
        (SMALL + "kind = 'text'\n", "must be of kind 'commands'"),
        (SMALL + "tasks = ['tags']\n", "settings for 'tags'"),
        (SMALL + "[explore]\nrounds = 1\n", "tokens of every stage and round"),
        (SMALL + "[reward]\nrelevance = 0\n", "one of the weights"),
        (
            SMALL + "[distillation]\nweight = 2\n",
            r"distillation\.weight: .* less than or equal to 1",
        ),
        (SMALL + "[train]\nmicro_tokens = 8\n", "micro_tokens must be at least"),
        (SMALL.replace("10_000", "100"), "tokens of every stage"),
        (SMALL.replace("10_000", "-1"), r"stages\.0\.tokens: Input should be greater than 0"),
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


def test_an_older_recipe_keeps_its_digest() -> None:
    """Published checkpoints name it; later settings count only where they are given."""
    folder = Path(__file__).parents[2]
    made_by = json.loads((folder / "models/reference/recipe.json").read_text("utf-8"))
    recipe = Recipe.read(folder / "recipes/reference.toml")
    assert recipe.digest() == made_by["digest"]
    model = recipe.model.model_copy(update={"inner": 512})
    assert recipe.model_copy(update={"model": model}).digest() != made_by["digest"]


def test_the_shape_of_a_llama() -> None:
    model = ModelRecipe(architecture="llama", width=576, heads=9, kv_heads=3)
    decoder = model.decoder()
    assert decoder.traits == ("rms", "rotary", "gated")
    assert decoder.kv_width == 192
    assert decoder.inner == 1536  # of SmolLM2 and others of this width
    assert ModelRecipe().decoder().traits == ("layer", "learned", "plain")
