"""Training that makes a model judge its own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_slm.distill.hindsight import build_schema, relabel, with_support_of
from edge_slm.distill.levels import level_edges
from edge_slm.distill.model import fresh_model
from edge_slm.distill.objective import Learner, tensors
from edge_slm.distill.packing import IGNORED, Packer, encode_records
from edge_slm.distill.recipe import ModelRecipe
from edge_slm.distill.samples import Sample
from edge_slm.distill.tokenizer import train_tokenizer
from edge_slm_runtime.command import CommandSchema

from .conftest import made_samples

SHAPE = ModelRecipe(vocab_size=512, layers=2, width=32, heads=2, positions=96, dropout=0.0)


def made(judged: bool = True, dropout: float = 0.2) -> tuple[Packer, Any, CommandSchema, list[int]]:
    """Half of the samples are bad ones: their responses say "mud"."""
    samples = [
        Sample(s.request, f"{s.response} {'mud' if i % 2 else 'light'}", s.task)
        for i, s in enumerate(made_samples(240))
    ]
    rewards = np.array([0.1 if i % 2 else 0.9 for i in range(240)], np.float32)
    records = relabel(samples, rewards, level_edges(samples, rewards, 5, top=0.5))
    schema = build_schema(["image", "tags"], records, 5)
    tokenizer = train_tokenizer([s.response for s in samples], schema, 512)
    encoded, _ = encode_records(records, tokenizer, schema, 96)
    packer = Packer(
        encoded, schema, rows=4, length=96, dropout=dropout, bare=0.1, judged=judged, seed=5
    )
    levels = [tokenizer.token_to_id(t) for t in schema.axis("relevance").tokens()[1:]]
    return packer, encoded, schema, levels


def test_from_a_reward_on_the_level_is_the_highest() -> None:
    rng = np.random.default_rng(0)
    samples = [Sample("r", " ".join(["w"] * int(n)), "image") for n in rng.integers(3, 60, 900)]
    rewards = rng.random(900).astype(np.float32)
    for bands in (1, 3):
        levels = level_edges(samples, rewards, 5, bands=bands, top=0.7)["image"]
        got = np.array(
            [levels.of(r, s.words) for r, s in zip(rewards.tolist(), samples, strict=True)]
        )
        assert ((got == 4) == (rewards >= 0.7)).all()
        below = np.bincount(got[got < 4])
        assert below.min() > 0.8 * below.max()
    good = level_edges(samples, np.ones(900, np.float32), 5, top=0.7)["image"]
    assert good.of(1.0, 9) == 4
    assert good.of(0.5, 9) == 0


def test_a_bad_answer_to_a_high_command_is_judged_and_not_imitated() -> None:
    packer, encoded, _, levels = made()
    asked = imitated = known = 0
    for number, rows in enumerate(packer.epoch(0)):
        batch = packer.batch(0, number, rows)
        for r, row in enumerate(rows):
            for s, index in enumerate(row):
                here = batch.segment[r] == s
                ids, achieved = batch.ids[r][here], batch.achieved[r][here]
                labels = batch.labels[r][here]
                best = encoded[index].record.command.relevance == 4
                said = [levels.index(i) for i in ids if i in levels]
                assert (achieved[:-1] == IGNORED).all()
                learns = (labels != IGNORED).any()
                if achieved[-1] == IGNORED:  # the command tells the level
                    assert said == [encoded[index].record.command.relevance]
                    assert learns
                    continue
                known += 1
                assert achieved[-1] == best
                assert said in ([], [4])
                assert learns == (best or said == [])
                if said:
                    asked, imitated = asked + 1, imitated + learns
    assert known > 100
    assert 0.35 < imitated / asked < 0.65
    plain, *_ = made(judged=False)
    assert (plain.batch(0, 0, plain.epoch(0)[0]).achieved == IGNORED).all()


def test_the_loss_is_the_cross_entropy_of_good_and_bad() -> None:
    packer, _, _, levels = made()
    batch = tensors(packer.batch(0, 0, packer.epoch(0)[0]), "cpu")
    learner = Learner(fresh_model(SHAPE, seed=1), confidence=2.0, levels=levels).eval()
    parts = {name: part.item() for name, part in learner(batch).items()}
    assert parts["loss"] == pytest.approx(parts["cross_entropy"] + 2 * parts["confidence"])
    mask = batch["segment"][:, None, :, None] == batch["segment"][:, None, None, :]
    logits = learner.lm(
        input_ids=batch["ids"], position_ids=batch["positions"], attention_mask=mask.tril()
    ).logits
    known = batch["achieved"] != IGNORED
    chance = logits[known][:, levels].softmax(-1)[:, -1]
    direct = torch.nn.functional.binary_cross_entropy(
        chance, batch["achieved"][known].float(), reduction="sum"
    )
    assert parts["confidence"] == pytest.approx(direct.item(), rel=1e-4)


def test_a_model_learns_to_tell_good_from_bad() -> None:
    packer, _, _, levels = made(dropout=0.1)
    learner = Learner(fresh_model(SHAPE, seed=1), confidence=20.0, levels=levels)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=5e-3)
    losses = []
    for epoch in range(12):
        for number, rows in enumerate(packer.epoch(epoch)):
            made_batch = packer.batch(epoch, number, rows)
            parts = learner(tensors(made_batch, "cpu"))
            (parts["loss"] / made_batch.loss_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(parts["confidence"].item() / max(1, (made_batch.achieved >= 0).sum()))
    assert losses[0] > 0.5
    assert np.mean(losses[-5:]) < 0.1


def test_what_the_checkpoint_before_saw_is_supported(tmp_path: Path) -> None:
    _, _, schema, _ = made()
    before = {"image": {"words": {"40": 7, "2": 1}}, "gone": {"words": {"3": 9}}}
    (tmp_path / "command.json").write_text(json.dumps({**schema.to_json(), "support": before}))
    merged = with_support_of(str(tmp_path), schema)
    words = schema.support["image"]["words"]
    assert merged.support["image"]["words"] == {**words, "40": 7, "2": words.get("2", 0) + 1}
    assert merged.support["tags"] == schema.support["tags"]
    assert "gone" not in merged.support
    assert with_support_of("", schema) is schema
    assert with_support_of(str(tmp_path / "none"), schema) is schema
