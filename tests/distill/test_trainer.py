from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch

from edge_slm.distill.hindsight import build_schema, relabel
from edge_slm.distill.levels import level_edges
from edge_slm.distill.model import fresh_model
from edge_slm.distill.objective import Learner
from edge_slm.distill.packing import encode_records
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.rounding import matrices, nearest
from edge_slm.distill.tokenizer import train_tokenizer
from edge_slm.distill.trainer import Stage, Trainer, translate_out_of_memory
from edge_slm.progress import silent
from edge_slm_runtime.errors import DataError, OutOfMemory

from .conftest import made_samples


def make_trainer(recipe: Recipe, out: Path | None = None, **stage: float) -> Trainer:
    samples = made_samples(120)
    rewards = np.random.default_rng(0).random(len(samples)).astype(np.float32)
    records = relabel(samples, rewards, level_edges(samples, rewards))
    schema = build_schema(["image", "tags"], records)
    tokenizer = train_tokenizer([s.response for s in samples], schema, 512)
    encoded, _ = encode_records(records, tokenizer, schema, 96)
    learner = Learner(fresh_model(recipe.model, seed=1), countdown=recipe.train.countdown)
    what = Stage("s", encoded, [], schema, 96 * 4 * 6, 3e-3, "data", **stage)
    return Trainer(recipe, what, learner, accelerate.Accelerator(cpu=True), out)


def changed(recipe: Recipe, **train: object) -> Recipe:
    without = recipe.model.model_copy(update={"dropout": 0.0})
    settings = recipe.train.model_copy(update=train)
    return recipe.model_copy(update={"train": settings, "model": without})


def weights(trainer: Trainer, steps: int = 3) -> torch.Tensor:
    batches = trainer.batches()
    for _ in range(steps):
        trainer.step(next(batches))
    return torch.cat([p.detach().flatten() for p in trainer.plain.parameters()])


@pytest.mark.parametrize(
    "train",
    [{"micro_tokens": 96}, {"micro_tokens": 96 * 3}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_memory_settings_do_not_change_the_result(recipe: Recipe, train: dict[str, int]) -> None:
    # 96 × 3: passes of three rows and of one.
    one, two = (weights(make_trainer(r)) for r in (changed(recipe), changed(recipe, **train)))
    torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def test_bf16_stays_near_fp32(recipe: Recipe) -> None:
    one = weights(make_trainer(changed(recipe)))
    two = weights(make_trainer(changed(recipe, precision="bf16")))
    assert 0 < (one - two).abs().mean() < 0.002


def test_a_rounded_stage_computes_with_int4_and_trains_float_weights(recipe: Recipe) -> None:
    rounded = make_trainer(changed(recipe), rounded=True)
    by_hand = make_trainer(changed(recipe))
    for weight, inputs_first in matrices(by_hand.plain.lm):
        values = weight.data.T if inputs_first else weight.data
        values.copy_(nearest(values))
    batch = next(rounded.batches())
    assert rounded.step(batch)["cross_entropy"] == by_hand.step(batch)["cross_entropy"]
    (weight, _), *_ = matrices(rounded.plain.lm)
    assert len(weight.unique()) > weight.numel() / 2


def test_a_stage_ends_with_the_weights_of_the_lowest_held_out_loss(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 1.5, 1.5, 4.0])
    often = changed(recipe, evaluate_every=1)
    trainer = make_trainer(often, tmp_path)
    monkeypatch.setattr(trainer, "evaluate", lambda: {"valid_loss": next(losses)})
    assert trainer.run(silent, None, [])
    assert trainer.at == 6
    assert trainer.last["best_step"] == 2
    kept = torch.cat([p.detach().flatten() for p in trainer.plain.parameters()])
    torch.testing.assert_close(kept, weights(make_trainer(often), steps=2), rtol=0, atol=0)


def test_kl_is_to_the_model_before_and_grows_from_nothing(recipe: Recipe) -> None:
    trainer = make_trainer(changed(recipe), kl=0.5, entropy=0.1)
    batches = trainer.batches()
    kls = [trainer.step(next(batches))["kl"] for _ in range(6)]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[-1] > kls[1] > 0
    free = make_trainer(changed(recipe))
    assert "kl" not in free.step(next(free.batches()))


def test_kl_holds_the_model_back(recipe: Recipe) -> None:
    start = torch.cat([p.detach().flatten() for p in make_trainer(recipe).plain.parameters()])
    far, near = (
        (weights(make_trainer(changed(recipe), kl=kl), 6) - start).norm() for kl in (0.0, 50.0)
    )
    assert near < far


_TWO = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from distill.test_trainer import changed, make_trainer, weights
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.rounding import matrices, nearest
recipe = changed(Recipe.model_validate_json(sys.argv[2]))
trainer = make_trainer(recipe)
result = weights(trainer)
assert trainer.accelerator.num_processes == 2
if trainer.accelerator.is_main_process:
    torch.save(result, sys.argv[3])
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(recipe: Recipe, tmp_path: Path) -> None:
    script, result = tmp_path / "two.py", tmp_path / "weights.pt"
    script.write_text(_TWO, "utf-8")
    tests = str(Path(__file__).parents[1])
    arguments = [str(script), tests, recipe.model_dump_json(), str(result)]
    # accelerate's variable: gloo on the CPU, also where a GPU is.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
            *("--nproc-per-node=2", "--standalone", *arguments),
        ],
        check=True,
        env=environment,
        capture_output=True,
        timeout=240,
    )
    one = weights(make_trainer(changed(recipe)))
    torch.testing.assert_close(one, torch.load(result), atol=2e-5, rtol=1e-4)


def test_rows_that_cannot_be_shared_are_named(recipe: Recipe) -> None:
    class Five:
        num_processes, device, process_index = 5, torch.device("cpu"), 0
        prepare = staticmethod(lambda *things: things)

    trainer = make_trainer(recipe)
    with pytest.raises(DataError, match="4 rows a step cannot be shared by 5 processes"):
        Trainer(recipe, trainer.stage, trainer.plain, Five(), None)


def test_memory_that_does_not_suffice_names_the_setting(recipe: Recipe) -> None:
    with (
        pytest.raises(OutOfMemory, match=r"halve train.micro_tokens \(now 384\)"),
        translate_out_of_memory(recipe),
    ):
        torch.empty(1 << 50)  # a petabyte
    with pytest.raises(RuntimeError, match="shape"), translate_out_of_memory(recipe):
        torch.zeros(2).view(3)


def test_the_run_is_shown_on_a_tensorboard(recipe: Recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(recipe, tmp_path)
    assert trainer.run(silent, None, [])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "s")).Reload()
    assert [event.step for event in events.Scalars("cross_entropy")] == [1, 2, 3, 4, 5, 6]
