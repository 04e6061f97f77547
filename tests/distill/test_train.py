from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from edge_slm.distill.recipe import Recipe
from edge_slm.distill.train import learning_rate, train
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import DataError, TargetExists


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def undisturbed(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("run")
    return train(recipe, [data_file], out, cache=cache)


def test_a_run_ends_in_a_checkpoint_that_transformers_loads(undisturbed: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(undisturbed)
    assert model.config.n_positions == 96
    schema = CommandSchema.from_json(json.loads((undisturbed / "command.json").read_text("utf-8")))
    tokenizer = AutoTokenizer.from_pretrained(undisturbed)
    assert tokenizer.convert_tokens_to_ids(schema.special_tokens()) == list(
        range(len(schema.special_tokens()))
    )
    facts = json.loads((undisturbed / "recipe.json").read_text("utf-8"))
    assert facts["metrics"]["steps"] == 8
    assert facts["data"]["samples_by_task_and_kind"]["image"]["mismatch"] > 0
    weights = (undisturbed / "model.safetensors").stat().st_size
    assert weights == pytest.approx(2 * model.num_parameters(), rel=0.1)  # fp16, tied head once


def test_loss_falls(undisturbed: Path) -> None:
    rows = metrics(undisturbed.parent)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.3
    assert rows[-1]["valid_loss"] > 0


def test_a_stopped_run_continues_to_the_same_weights(
    recipe: Recipe, data_file: Path, cache: Path, undisturbed: Path, tmp_path: Path
) -> None:
    state = train(recipe, [data_file], tmp_path, cache=cache, max_steps=4)
    assert state.name == "state.pt"
    # As a kill would leave it: a metrics line of a step that was not saved.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5}\n')
    checkpoint = train(recipe, [data_file], tmp_path, cache=cache)
    one = GPT2LMHeadModel.from_pretrained(undisturbed).state_dict()
    two = GPT2LMHeadModel.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[row["train_loss"] for row in metrics(run)] for run in (undisturbed.parent, tmp_path)]
    assert losses[0] == losses[1]


def test_a_run_of_another_recipe_or_data_is_not_continued(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    train(recipe, [data_file], tmp_path / "run", cache=cache, max_steps=1)
    other = recipe.model_copy(update={"seed": 4})
    with pytest.raises(DataError, match="another recipe"):
        train(other, [data_file], tmp_path / "run", cache=cache)
    more = tmp_path / "more.jsonl"
    row = {"request": "a copper kettle", "response": "a copper kettle, soft light", "task": "image"}
    more.write_text(json.dumps(row), "utf-8")
    with pytest.raises(DataError, match="another data"):
        train(recipe, [data_file, more], tmp_path / "run", cache=cache)


def test_ctrl_c_saves_between_steps(
    recipe: Recipe, data_file: Path, cache: Path, undisturbed: Path, tmp_path: Path
) -> None:
    def press(stage: str, done: int, total: int, remark: str = "") -> None:
        if stage == "train" and done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, [data_file], tmp_path, cache=cache, report=press)
    assert len(metrics(tmp_path)) == 2  # the step under way was finished and saved
    checkpoint = train(recipe, [data_file], tmp_path, cache=cache)
    one, two = ((c / "model.safetensors").read_bytes() for c in (undisturbed, checkpoint))
    assert one == two


def test_a_killed_run_continues_to_the_same_weights(
    recipe: Recipe, data_file: Path, cache: Path, undisturbed: Path, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys; from edge_slm.distill.recipe import Recipe;"
        "from edge_slm.distill.train import train;"
        "kill = lambda stage, done, *_: stage == 'train' and done == 5"
        " and os.kill(os.getpid(), signal.SIGKILL);"
        "train(Recipe.model_validate_json(sys.argv[1]), [sys.argv[2]], sys.argv[3],"
        " cache=sys.argv[4], report=kill)"
    )
    arguments = [recipe.model_dump_json(), data_file, tmp_path, cache]
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "state.pt").exists()
    checkpoint = train(recipe, [data_file], tmp_path, cache=cache)
    one, two = ((c / "model.safetensors").read_bytes() for c in (undisturbed, checkpoint))
    assert one == two


def test_a_loss_that_is_no_number_ends_the_run(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    wild = recipe.train.model_copy(update={"learning_rate": 1e30, "clip": 1e30})
    with pytest.raises(DataError, match="the loss is"):
        train(recipe.model_copy(update={"train": wild}), [data_file], tmp_path, cache=cache)
    assert not (tmp_path / "checkpoint").exists()


def test_nothing_held_out_is_no_held_out_loss(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    whole = recipe.data.model_copy(update={"holdout_percent": 0})
    train(
        recipe.model_copy(update={"data": whole}), [data_file], tmp_path, cache=cache, max_steps=4
    )
    assert "valid_loss" not in metrics(tmp_path)[-1]


def test_a_finished_run_is_not_overwritten(
    recipe: Recipe, data_file: Path, undisturbed: Path
) -> None:
    with pytest.raises(TargetExists, match="finished run"):
        train(recipe, [data_file], undisturbed.parent)


def test_the_schedule_warms_up_and_falls_to_a_tenth(recipe: Recipe) -> None:
    rates = [learning_rate(step, 100, recipe.train) for step in range(101)]
    assert rates[0] == pytest.approx(recipe.train.learning_rate / 2)
    assert max(rates) == pytest.approx(recipe.train.learning_rate)
    assert rates[-1] == pytest.approx(recipe.train.learning_rate / 10)
