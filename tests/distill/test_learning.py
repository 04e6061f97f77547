"""What would spoil the learning without breaking anything else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_slm.distill.buffer import Buffer
from edge_slm.distill.hindsight import relabel
from edge_slm.distill.levels import level_edges
from edge_slm.distill.objective import tensors
from edge_slm.distill.packing import IGNORED
from edge_slm.distill.prepare import Prepared, label, new_tokenizer, prepare, with_own
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.rewards import Keywords
from edge_slm.distill.samples import Sample
from edge_slm.distill.split import held_out
from edge_slm.distill.trainer import learning_rate

from .conftest import made_samples
from .test_trainer import changed, make_trainer


@pytest.fixture(scope="module")
def prepared(recipe: Recipe, data_file: Path) -> Prepared:
    return prepare(recipe, [data_file], Keywords())


def test_a_higher_reward_is_a_higher_level() -> None:
    samples = made_samples(300)
    rewards = np.random.default_rng(1).random(300).astype(np.float32)
    records = relabel(samples, rewards, level_edges(samples, rewards))
    for task in ("image", "tags"):
        of_task = [
            (reward, record.command.relevance)
            for reward, record in zip(rewards, records, strict=True)
            if record.command.task == task
        ]
        levels = [level for _, level in sorted(of_task)]
        assert levels == sorted(levels)
        assert (levels[0], levels[-1]) == (0, 9)
    for sample, record in zip(samples, records, strict=True):
        assert record.command.words == len(sample.response.split())
        assert (record.request, record.response) == (sample.request, sample.response)


def test_a_judgement_multiplies_the_reward(
    prepared: Prepared, recipe: Recipe, data_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in data_file.read_text("utf-8").splitlines()]
    judged = tmp_path / "judged.jsonl"
    judged.write_text("".join(json.dumps(row | {"quality": 0.25}) + "\n" for row in rows))
    lower = prepare(recipe, [judged], Keywords())
    assert len(lower.buffer.rewards()) == len(prepared.buffer.rewards())
    assert lower.buffer.rewards().max() == prepared.buffer.rewards().max() / 4


def test_the_buffer_keeps_the_best() -> None:
    buffer = Buffer(10)
    samples = [Sample(f"r{i}", f"t{i}", "image") for i in range(50)]
    buffer.add(samples, [i / 50 for i in range(50)])
    assert buffer.samples() == samples[:-11:-1]
    assert buffer.best("image", 3) == [[(samples[49 - i], (49 - i) / 50) for i in range(3)]]


def test_nothing_held_out_is_trained_on(prepared: Prepared) -> None:
    percent = prepared.recipe.data.holdout_percent
    assert prepared.held
    assert all(held_out(sample.request, percent) for sample in prepared.held)
    assert not any(held_out(sample.request, percent) for sample in prepared.buffer.samples())
    labelled = label(prepared, new_tokenizer(prepared))
    trained = {e.record.response for e in labelled.train if e.record and e.record.kind == "pair"}
    assert not trained & {e.record.response for e in labelled.valid if e.record}
    assert len(labelled.train) == len(prepared.buffer.samples())


def test_labels_are_the_next_tokens_of_responses_alone(recipe: Recipe) -> None:
    trainer = make_trainer(changed(recipe))
    batch = next(trainer.batches())
    for row in range(len(batch.ids)):
        labelled = batch.labels[row] != IGNORED
        assert (batch.labels[row][:-1][labelled[:-1]] == batch.ids[row][1:][labelled[:-1]]).all()
    prompts = (batch.segment >= 0) & (batch.labels == IGNORED)
    assert prompts.sum() > batch.loss_tokens / 10


def test_the_loss_is_the_sum_of_its_parts(recipe: Recipe) -> None:
    weights = {"kl": 0.7, "entropy": 0.3, "countdown": 0.2}
    trainer = make_trainer(changed(recipe, countdown=0.2), kl=0.7, entropy=0.3)
    with torch.no_grad():
        for parameter in trainer.plain.lm.parameters():  # else the KL is 0
            parameter.add_(torch.randn_like(parameter) * 0.02)
    batch = tensors(next(trainer.batches()), "cpu")
    parts = {name: part.item() for name, part in trainer.plain.eval()(batch).items()}
    assert min(parts.values()) > 0
    expected = (
        parts["cross_entropy"]
        + weights["kl"] * parts["kl"]
        - weights["entropy"] * parts["entropy"]  # more entropy is a lower loss
        + weights["countdown"] * parts["countdown"]
    )
    assert parts["loss"] == pytest.approx(expected, rel=1e-5)
    logits = trainer.plain.lm(
        input_ids=batch["ids"],
        position_ids=batch["positions"],
        attention_mask=_mask(batch["segment"]),
    ).logits
    direct = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert parts["cross_entropy"] == pytest.approx(direct.item(), rel=1e-4)


def _mask(segment: torch.Tensor) -> torch.Tensor:
    rows, length = segment.shape
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        for i in range(length):
            for j in range(i + 1):
                mask[row, 0, i, j] = segment[row, i] == segment[row, j]
    return mask


def test_the_rate_follows_the_schedule(recipe: Recipe) -> None:
    trainer = make_trainer(changed(recipe, warmup_steps=100))
    batches = trainer.batches()
    rates = []
    for _ in range(trainer.total_steps):
        trainer.step(next(batches))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    # Warm-up is a tenth of a short stage at most.
    warmup = trainer.total_steps // 10
    expected = [
        learning_rate(i, trainer.total_steps, trainer.stage.learning_rate, warmup)
        for i in range(trainer.total_steps)
    ]
    assert rates == pytest.approx(expected)
    assert rates[-1] < 0.3 * rates[0]


def test_the_countdown_is_learnt(recipe: Recipe) -> None:
    trainer = make_trainer(changed(recipe, countdown=1.0))
    batches = trainer.batches()
    losses = [trainer.step(next(batches))["countdown"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.3
    weight = trainer.plain.remaining.weight
    assert weight.grad is None  # cleared; it has moved all the same
    fresh = make_trainer(changed(recipe, countdown=1.0)).plain.remaining.weight
    assert not torch.equal(weight, fresh)


def test_a_round_is_half_of_its_own(prepared: Prepared) -> None:
    labelled = label(prepared, new_tokenizer(prepared))
    assert with_own(labelled, 0.0, "s") is labelled
    own = [Sample(f"own {i}", "soft light, of its own", "image", "own") for i in range(20)]
    prepared.buffer.add(own, [0.5] * 20)
    half = with_own(label(prepared, new_tokenizer(prepared)), 0.5, "s")
    kinds = [e.record.kind == "own" for e in half.train if e.record]
    assert sum(kinds) == 20
    assert len(kinds) == 40


def test_a_tiny_run_is_the_one_that_it_was(recipe: Recipe) -> None:
    """A change of the learning changes these; that must be meant."""
    trainer = make_trainer(changed(recipe))
    batches = trainer.batches()
    losses = [trainer.step(next(batches))["cross_entropy"] for _ in range(6)]
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text("utf-8"))
    assert losses == pytest.approx(golden, abs=0.02)
