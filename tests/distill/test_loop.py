from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from edge_slm.distill.checkpoint import load_state, save_state
from edge_slm.distill.loop import distill
from edge_slm.distill.recipe import ExploreRecipe, Recipe, StageRecipe
from edge_slm.distill.trainer import learning_rate
from edge_slm_converters.checkpoint import read_checkpoint
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import DataError, TargetExists
from edge_slm_runtime.files import locked_folder

pytestmark = pytest.mark.slow

TESTS = str(Path(__file__).parents[1])


def metrics(run: Path, stage: str = "stage-1") -> list[dict[str, float]]:
    lines = (run / f"metrics-{stage}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("run")
    return distill(recipe, [data_file], out, cache=cache)


def test_a_run_ends_in_a_checkpoint_that_transformers_loads(undisturbed: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(undisturbed)
    assert model.config.n_positions == 96
    schema = CommandSchema.from_json(json.loads((undisturbed / "command.json").read_text("utf-8")))
    tokenizer = AutoTokenizer.from_pretrained(undisturbed)
    assert tokenizer.convert_tokens_to_ids(schema.special_tokens()) == list(
        range(len(schema.special_tokens()))
    )
    facts = json.loads((undisturbed / "recipe.json").read_text("utf-8"))
    assert [part["stage"] for part in facts["history"]] == ["stage-1", "round-1"]
    assert facts["history"][0]["steps"] == 8
    assert facts["data"]["samples_by_task_and_kind"]["image"]["mismatch"] > 0
    weights = (undisturbed / "model.safetensors").stat().st_size
    assert weights == pytest.approx(2 * model.num_parameters(), rel=0.1)  # fp16, tied head once


def test_loss_falls(undisturbed: Path) -> None:
    rows = metrics(undisturbed.parent)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] - 0.3
    assert rows[-1]["valid_loss"] > 0


def test_a_stopped_run_continues_to_the_same_weights(
    recipe: Recipe, data_file: Path, cache: Path, undisturbed: Path, tmp_path: Path
) -> None:
    state = distill(recipe, [data_file], tmp_path, cache=cache, max_steps=4)
    assert state.name == "state.pt"
    # As a kill would leave it: a metrics line of a step that was not saved.
    with (tmp_path / "metrics-stage-1.jsonl").open("a") as file:
        file.write('{"step": 5}\n')
    checkpoint = distill(recipe, [data_file], tmp_path, cache=cache)
    one = GPT2LMHeadModel.from_pretrained(undisturbed).state_dict()
    two = GPT2LMHeadModel.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [
        [row["cross_entropy"] for row in metrics(run)] for run in (undisturbed.parent, tmp_path)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("change", ["one bit", "cut", "empty"])
def test_a_damaged_state_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "state.pt"
    save_state({"model": {"weight": torch.arange(1000.0)}}, path)
    assert load_state(path)["model"]["weight"][7] == 7
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    damaged = {"one bit": content, "cut": content[:-1000], "empty": b""}[change]
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"state\.pt is damaged"):
        load_state(path)


def test_a_run_has_its_folder_alone(recipe: Recipe, data_file: Path, tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(DataError, match="another process is writing"):
        distill(recipe, [data_file], tmp_path)


def test_a_run_of_another_recipe_or_data_is_not_continued(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    distill(recipe, [data_file], tmp_path / "run", cache=cache, max_steps=1)
    other = recipe.model_copy(update={"seed": 4})
    with pytest.raises(DataError, match="another recipe"):
        distill(other, [data_file], tmp_path / "run", cache=cache)
    more = tmp_path / "more.jsonl"
    row = {"request": "a copper kettle", "response": "a copper kettle, soft light", "task": "image"}
    more.write_text(json.dumps(row), "utf-8")
    with pytest.raises(DataError, match="another data"):
        distill(recipe, [data_file, more], tmp_path / "run", cache=cache)


def test_a_run_from_other_weights_is_not_continued(
    recipe: Recipe, data_file: Path, cache: Path, undisturbed: Path, tmp_path: Path
) -> None:
    init = Path(shutil.copytree(undisturbed, tmp_path / "init"))
    (init / "checkpoint.sha256").unlink()
    model = recipe.model.model_copy(update={"init": str(init)})
    begun = recipe.model_copy(update={"model": model})
    distill(begun, [data_file], tmp_path / "run", cache=cache, max_steps=1)
    weights = load_file(init / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] += 1
    save_file(weights, init / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="another init"):
        distill(begun, [data_file], tmp_path / "run", cache=cache)


def test_ctrl_c_saves_between_steps(
    recipe: Recipe, data_file: Path, cache: Path, undisturbed: Path, tmp_path: Path
) -> None:
    def press(stage: str, done: int, total: int, remark: str = "") -> None:
        if stage == "train stage-1" and done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(recipe, [data_file], tmp_path, cache=cache, report=press)
    assert len(metrics(tmp_path)) == 2  # the step under way was finished and saved
    checkpoint = distill(recipe, [data_file], tmp_path, cache=cache)
    one, two = ((c / "model.safetensors").read_bytes() for c in (undisturbed, checkpoint))
    assert one == two


# Whole runs in processes of their own: other tests leave torch's thread settings behind, and
# with them another order of sums.
RUNS = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from distill.forks import status_of
from edge_slm.distill.loop import distill
from edge_slm.distill.recipe import Recipe

recipe, data, cache, runs = sys.argv[2:]
ends = []
for out, stage, last in json.loads(runs):
    def kill(at, done, *_):
        if at == stage and done >= last:
            os.kill(os.getpid(), signal.SIGKILL)

    ends.append(status_of(lambda: distill(
        Recipe.model_validate_json(recipe), [data], out, cache=cache, report=kill
    )))
    ends.append(os.path.exists(os.path.join(out, "checkpoint")))
print(json.dumps(ends))
"""


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_run_killed_anywhere_continues_to_the_same_weights(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    deaths = [(killed, "train stage-1", 5), (killed, "explore 1", 0), (killed, "train round-1", 2)]
    runs = [(whole, "", 0), *deaths, (killed, "", 0)]
    arguments = [TESTS, recipe.model_dump_json(), str(data_file), str(cache), json.dumps(runs)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNS, *arguments], capture_output=True, check=True
    )
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends == [0, True, *[-signal.SIGKILL, False] * 3, 0, True]
    weights = "checkpoint/model.safetensors"
    one, two = ((tmp_path / run / weights).read_bytes() for run in ("whole", "killed"))
    assert one == two
    assert not (tmp_path / "killed/round-1.journal").exists()


def test_a_loss_that_is_no_number_ends_the_run(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    wild = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"clip": 1e30}),
            "stages": (StageRecipe(tokens=96 * 4 * 8, learning_rate=1e30),),
        }
    )
    with pytest.raises(DataError, match="the loss is"):
        distill(wild, [data_file], tmp_path, cache=cache)
    assert not (tmp_path / "checkpoint").exists()


def test_nothing_held_out_is_no_held_out_loss(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    whole = recipe.data.model_copy(update={"holdout_percent": 0})
    distill(
        recipe.model_copy(update={"data": whole}), [data_file], tmp_path, cache=cache, max_steps=4
    )
    assert "valid_loss" not in metrics(tmp_path)[-1]


def test_a_finished_run_is_returned_and_never_overwritten(
    recipe: Recipe, data_file: Path, undisturbed: Path
) -> None:
    assert distill(recipe, [data_file], undisturbed.parent) == undisturbed
    with pytest.raises(TargetExists, match="another recipe"):
        distill(recipe.plain(), [data_file], undisturbed.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.json"])
def test_a_finished_run_that_was_damaged_is_not_returned(
    name: str, recipe: Recipe, data_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copytree(undisturbed, tmp_path / "checkpoint")) / name
    content = bytearray(file.read_bytes())
    for damaged in (content[:-2], content[:-9] + b"0" + content[-8:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="checkpoint is damaged"):
            distill(recipe, [data_file], tmp_path)


def test_a_round_learns_from_what_the_model_achieved(undisturbed: Path) -> None:
    rows = [
        json.loads(line)
        for line in (undisturbed.parent / "round-1.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(rows) == 2 * 2 * 12  # tasks × candidates × requests
    assert all(row["relevance"] >= 5 for row in rows)  # asked as the best had, or more
    facts = json.loads((undisturbed / "recipe.json").read_text("utf-8"))["history"][1]
    assert facts["episodes"] == len(rows)
    assert facts["ended"] == sum(row["ended"] for row in rows)
    assert {"kl", "entropy", "countdown"} <= set(metrics(undisturbed.parent, "round-1")[0])


def test_a_run_without_samples_or_text_says_so(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples and no teacher"):
        distill(recipe, [], tmp_path)
    general = recipe.model_copy(
        update={"stages": (StageRecipe(kind="text", tokens=9000), *recipe.stages)}
    )
    with pytest.raises(DataError, match="general text"):
        distill(general, [tmp_path], tmp_path)


def test_transfer_from_general_text_to_all_tasks_to_one(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    novel = tmp_path / "novel.txt"
    novel.write_text("It was a grey morning, and the sea lay still.\n\n" * 400, "utf-8")
    few = 96 * 4 * 2
    staged = recipe.model_copy(
        update={
            "stages": (
                StageRecipe(kind="text", tokens=few),
                StageRecipe(tokens=few),
                StageRecipe(tokens=few, tasks=("tags",)),
            ),
            "explore": ExploreRecipe(),
        }
    )
    checkpoint = distill(staged, [data_file], tmp_path / "run", text=[novel], cache=cache)
    facts = json.loads((checkpoint / "recipe.json").read_text("utf-8"))
    assert [part["stage"] for part in facts["history"]] == ["stage-1", "stage-2", "stage-3"]
    assert "countdown" in metrics(tmp_path / "run", "stage-2")[0]


def test_the_schedule_warms_up_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, 100, 1e-3, warmup=2) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3 / 2)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)


def test_a_llama_learns_and_explores(
    recipe: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    shape = {"architecture": "llama", "heads": 4, "kv_heads": 2}
    llama = recipe.model_copy(update={"model": recipe.model.model_copy(update=shape)})
    checkpoint = distill(llama, [data_file], tmp_path, cache=cache)
    rows = metrics(tmp_path)
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] - 0.3
    decoder = read_checkpoint(checkpoint).decoder
    assert decoder.architecture == "llama"
    assert decoder.kv_heads == 2
