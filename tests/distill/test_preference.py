"""Training that prefers good answers to bad ones of the same request (DPO)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch.nn import functional

from edge_slm.distill.hindsight import build_schema, relabel
from edge_slm.distill.levels import level_edges
from edge_slm.distill.model import fresh_model
from edge_slm.distill.objective import Learner, tensors
from edge_slm.distill.packing import IGNORED, Encoded, Packer, encode_records
from edge_slm.distill.recipe import ModelRecipe, Recipe
from edge_slm.distill.samples import Sample
from edge_slm.distill.tokenizer import train_tokenizer
from edge_slm.distill.trainer import Stage, Trainer
from edge_slm.progress import silent

from .conftest import made_samples

SHAPE = ModelRecipe(vocab_size=512, layers=2, width=32, heads=2, positions=128, dropout=0.0)


def made(dropout: float = 0.2, paired: bool = True) -> tuple[Packer, list[Encoded], list[int]]:
    """Three responses to each request, the first of them a good one; bad ones say "mud". Of the
    last, it is known which sentence is at fault."""
    samples, rewards = [], []
    for i, s in enumerate(made_samples(90)):
        for word in ("light", "mud", "mud and mud"):
            fault = f"In {word}." * (word == "mud and mud")
            text = f"{s.response}. In {word}. So it is."
            samples.append(Sample(f"{s.request} {i}", text, s.task, fault=fault))
            rewards.append(0.9 if word == "light" else 0.1)
    scores = np.array(rewards, np.float32)
    records = relabel(samples, scores, level_edges(samples, scores, 5, top=0.5))
    schema = build_schema(["image", "tags"], records, 5)
    tokenizer = train_tokenizer([s.response for s in samples], schema, 512)
    encoded, _ = encode_records(records, tokenizer, schema, 128)
    packer = Packer(
        encoded,
        schema,
        rows=4,
        length=128,
        dropout=dropout,
        bare=0.1,
        judged=True,
        paired=paired,
        seed=5,
    )
    return packer, encoded, [tokenizer.token_to_id(t) for t in schema.axis("relevance").tokens()]


def test_pairs_are_of_one_request_under_one_command() -> None:
    packer, encoded, levels = made()
    seen: list[int] = []
    pairs = 0
    for number, rows in enumerate(packer.epoch(0, partial=True)):
        batch = packer.batch(0, number, rows)
        imitated = 0
        for r, row in enumerate(rows):
            seen += row
            of: dict[int, tuple[Any, ...]] = {}
            for s, index in enumerate(row):
                here = batch.segment[r] == s
                record, preferred = encoded[index].record, batch.preferred[r][here]
                assert record
                labels, response = batch.labels[r][here], encoded[index].response
                labelled = labels != IGNORED
                n = int(preferred[-1])
                assert set(preferred[labelled]) <= ({0, n} if n > 0 else {n})
                assert (preferred[:-1][~labelled[:-1]] == 0).all()
                imitated += labelled.sum() * (n >= 0)
                if n:
                    prompt = batch.ids[r][here][: -len(response)].tolist()
                    assert [i for i in prompt if i in levels] in ([levels[-1]], [levels[0]])
                    of[n] = record.request, prompt, record.command.relevance == 4
                    assert batch.achieved[r][here][-1] == (n > 0)
            for n in (n for n in of if n > 0):
                assert of[n] == (*of[-n][:2], True)
                assert not of[-n][2]
                pairs += 1
        assert batch.loss_tokens == imitated
    assert sorted(seen) == list(range(len(encoded)))
    assert pairs > 80  # a few of 90 do not fit into a row
    others = made(paired=False)[0]
    assert not others.batch(0, 0, others.epoch(0)[0]).preferred.any()


def test_what_is_compared_is_where_they_part_or_the_sentence_at_fault() -> None:
    packer, encoded, _ = made(dropout=0.0)
    seen = set()
    for number, rows in enumerate(packer.epoch(0)):
        batch = packer.batch(0, number, rows)
        for r, row in enumerate(rows):
            for s, index in enumerate(row):
                here = batch.segment[r] == s
                preferred, labels = batch.preferred[r][here], batch.labels[r][here]
                achieved = batch.achieved[r][here][-len(encoded[index].response) :]
                response = encoded[index].response
                if not preferred[-1]:
                    continue
                fault = encoded[index].fault
                first, second, third = encoded[index].sentences
                known = {n: a for n, a in enumerate(achieved.tolist()) if a != IGNORED}
                compared = labels[(preferred != 0) & (labels != IGNORED)].tolist()
                assert compared
                if fault is None:
                    assert compared == response[-len(compared) :]
                    assert len(response) - second < len(compared) <= len(response) - first
                else:
                    assert fault == 1
                    assert compared == response[second - len(compared) : second]
                    assert len(compared) <= second - first
                if preferred[-1] > 0:
                    assert (labels != IGNORED).sum() == len(response)
                    assert known == {first - 1: 1, second - 1: 1, third: 1}
                elif fault is None:
                    assert known == {third: 0}
                else:
                    assert known == {first - 1: 1, second - 1: 0, third: 0}
                seen.add((preferred[-1] > 0, fault))
    assert seen == {(True, None), (False, None), (False, 1)}


def test_others_are_compared_in_another_epoch() -> None:
    packer, *_ = made()

    def rivals(epoch: int) -> set[int]:
        return {
            index
            for rows in packer.epoch(epoch)
            for row in rows
            for index, n in zip(row, packer._pairs(row), strict=True)
            if n < 0
        }

    first, second = rivals(0), rivals(1)
    assert rivals(0) == first
    assert 20 < len(first & second) < 70


def test_those_that_begin_alike_are_compared() -> None:
    texts = ["a red fox runs", "a cat", "a red fox sleeps", "a red fox is green", "the fox"]
    samples = [Sample("fox", text, "image") for text in texts]
    rewards = np.array([0.9, 0.9, 0.1, 0.1, 0.1], np.float32)
    records = relabel(samples, rewards, level_edges(samples, rewards, 5, top=0.5))
    schema = build_schema(["image"], records, 5)
    tokenizer = train_tokenizer(texts, schema, 512)
    encoded, _ = encode_records(records, tokenizer, schema, 128)
    packer = Packer(encoded, schema, rows=1, length=128, dropout=0, paired=True, seed=1)
    seen = set()
    for epoch in range(8):
        pairs = {unit[0]: unit[1] for unit in packer._units(epoch) if len(unit) == 2}
        assert pairs.keys() == {0, 1}
        seen.add(pairs[0])
        assert pairs[0] in (2, 3)
    assert seen == {2, 3}


def test_the_loss_is_that_of_the_formula() -> None:
    packer, *_ = made()
    batch = tensors(packer.batch(0, 0, packer.epoch(0)[0]), "cpu")
    learner = Learner(fresh_model(SHAPE, seed=1), preference=3.0, levels=[1]).eval()
    learner.begin_stage(kl=0.0, entropy=0.0)
    at_first = learner(batch)
    pairs = at_first["pairs"].item()
    assert at_first["preference"].item() == pytest.approx(pairs * np.log(2), rel=1e-5)
    with torch.no_grad():
        for parameter in learner.lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(3)), alpha=0.02)

    def log_p(lm: Any, row: int, segment: int, compared: bool = True) -> torch.Tensor:
        here = batch["segment"][row] == segment
        labels = batch["labels"][row][here]
        log_q = lm(input_ids=batch["ids"][row][here][None]).logits[0].log_softmax(-1)
        learnt = labels != IGNORED
        if compared:
            learnt &= batch["preferred"][row][here] != 0
        return log_q[learnt].gather(-1, labels[learnt][:, None]).sum()

    before, gains, imitated = learner._before[0], [], torch.zeros(())
    for row, preferred in enumerate(batch["preferred"]):
        ratios = {}
        for segment in range(int(batch["segment"][row].max()) + 1):
            here = batch["segment"][row] == segment
            n = int(preferred[here][-1])
            ratios[n] = log_p(learner.lm, row, segment) - log_p(before, row, segment)
            imitated -= log_p(learner.lm, row, segment, compared=False) * (n >= 0)
        gains += [ratios[n] - ratios[-n] for n in ratios if n > 0]
    assert pairs == len(gains) > 3
    parts = learner(batch)
    direct = -functional.logsigmoid(0.1 * torch.stack(gains)).sum()
    assert parts["preference"].item() == pytest.approx(direct.item(), rel=1e-4)
    assert parts["cross_entropy"].item() == pytest.approx(imitated.item(), rel=1e-4)
    assert parts["pairs_right"].item() == sum(gain > 0 for gain in gains)
    total = parts["cross_entropy"] + 3 * parts["preference"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-5)


def test_the_confidence_ranks_the_two_of_a_pair() -> None:
    packer, _, levels = made()
    batch = tensors(packer.batch(0, 0, packer.epoch(0)[0]), "cpu")
    learner = Learner(fresh_model(SHAPE, seed=1), confidence=1.0, levels=levels[1:]).eval()
    direct = torch.zeros(())
    for row, preferred in enumerate(batch["preferred"]):
        odds = {}
        for segment in range(int(batch["segment"][row].max()) + 1):
            here = batch["segment"][row] == segment
            logits = learner.lm(input_ids=batch["ids"][row][here][None]).logits[0]
            every = logits[:, levels[1:]].softmax(-1)[:, -1]
            for best, achieved in zip(every, batch["achieved"][row][here], strict=True):
                if achieved != IGNORED:
                    direct -= (best if achieved == 1 else 1 - best).log()
            odds[int(preferred[here][-1])] = best.log() - (1 - best).log()
        for n in (n for n in odds if n > 0):
            direct -= functional.logsigmoid(odds[n] - odds[-n])
    assert learner(batch)["confidence"].item() == pytest.approx(direct.item(), rel=1e-4)


def test_a_model_learns_to_prefer_the_good_ones() -> None:
    packer, *_ = made(dropout=0.0)
    learner = Learner(fresh_model(SHAPE, seed=1), preference=10.0, levels=[1])
    learner.begin_stage(kl=0.0, entropy=0.0)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    for epoch in range(3):
        for number, rows in enumerate(packer.epoch(epoch)):
            made_batch = packer.batch(epoch, number, rows)
            parts = learner(tensors(made_batch, "cpu"))
            (parts["loss"] / made_batch.loss_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert parts["pairs_right"] == parts["pairs"] > 0
    assert parts["preference"] / parts["pairs"] < 0.5


def make_trainer(recipe: Recipe, out: Path | None = None, **train: float) -> Trainer:
    packer, encoded, levels = made()
    settings = recipe.train.model_copy(
        update={"batch_tokens": 128 * 4, "confidence": 1.0, "preference": 5.0, **train}
    )
    recipe = recipe.model_copy(update={"train": settings, "model": SHAPE})
    learner = Learner(fresh_model(SHAPE, seed=1), confidence=1.0, preference=5.0, levels=levels[1:])
    what = Stage("s", encoded, [], packer._schema, 128 * 4 * 6, 3e-3, "data")
    return Trainer(recipe, what, learner, accelerate.Accelerator(cpu=True), out)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.plain.parameters()])


def test_a_step_reports_the_pairs_and_may_be_taken_in_parts(recipe: Recipe) -> None:
    whole, parts = make_trainer(recipe), make_trainer(recipe, micro_tokens=128)
    for trainer in (whole, parts):
        batches = trainer.batches()
        first, *_, last = [trainer.step(next(batches)) for _ in range(4)]
        assert first["preference"] == pytest.approx(np.log(2), rel=1e-4)
        assert last["preference"] != pytest.approx(np.log(2), rel=1e-4)
        assert 0 <= last["pairs_right"] <= 1
    torch.testing.assert_close(weights(whole), weights(parts), atol=2e-5, rtol=1e-4)


def test_a_resumed_stage_compares_with_the_model_that_it_began_with(
    recipe: Recipe, tmp_path: Path
) -> None:
    whole, begun = make_trainer(recipe), make_trainer(recipe, tmp_path)
    whole.run(silent, None, [])
    assert not begun.run(silent, 3, [])
    resumed = make_trainer(recipe, tmp_path)
    resumed.resume()
    assert resumed.at == 3
    assert resumed.run(silent, None, [])
    torch.testing.assert_close(weights(whole), weights(resumed))
