from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_slm.distill.hindsight import build_schema, relabel
from edge_slm.distill.levels import level_edges
from edge_slm.distill.model import fresh_model
from edge_slm.distill.objective import attention_mask, tensors
from edge_slm.distill.packing import IGNORED, Packer, encode_records, encode_text
from edge_slm.distill.recipe import ModelRecipe
from edge_slm.distill.tokenizer import train_tokenizer
from edge_slm_runtime.command import CommandSchema, default_axes

from .conftest import made_samples

SHAPES = [
    ModelRecipe(vocab_size=512, layers=2, width=32, heads=2, positions=96),
    ModelRecipe(
        architecture="llama", vocab_size=512, layers=2, width=32, heads=4, kv_heads=2, positions=96
    ),
]


def make_packer(dropout: float = 0.0, positions: int = 96) -> tuple[Packer, list, object, int]:  # type: ignore[type-arg]
    samples = made_samples(120)
    rewards = np.random.default_rng(0).random(len(samples)).astype(np.float32)
    records = relabel(samples, rewards, level_edges(samples, rewards))
    schema = build_schema(["image", "tags"], records)
    tokenizer = train_tokenizer([s.response for s in samples], schema, 512)
    encoded, too_long = encode_records(records, tokenizer, schema, positions)
    packer = Packer(encoded, schema, rows=4, length=96, dropout=dropout, seed=5)
    return packer, encoded, tokenizer, too_long


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_row_equals_its_records_alone(shape: ModelRecipe) -> None:
    packer, *_ = make_packer()
    batch = packer.batch(0, 0, packer.epoch(0)[0])
    model = fresh_model(shape, seed=0).eval()
    with torch.no_grad():
        packed = model(
            input_ids=torch.from_numpy(batch.ids),
            position_ids=torch.from_numpy(batch.positions),
            attention_mask=attention_mask(torch.from_numpy(batch.segment)),
        ).logits
        for row in range(2):
            for number in range(batch.segment[row].max() + 1):
                here = batch.segment[row] == number
                alone = model(input_ids=torch.from_numpy(batch.ids[row][here])[None]).logits[0]
                torch.testing.assert_close(packed[row][here], alone, atol=1e-5, rtol=1e-5)


def test_only_responses_bear_loss_and_every_record_comes_once() -> None:
    packer, encoded, tokenizer, _ = make_packer()
    plan = packer.epoch(0)
    seen = [index for rows in plan for row in rows for index in row]
    assert len(seen) == len(set(seen))
    assert len(seen) > 0.8 * len(encoded)
    batch = packer.batch(0, 0, plan[0])
    for row, indices in enumerate(plan[0]):
        for number, index in enumerate(indices):
            labels = batch.labels[row][batch.segment[row] == number]
            assert labels[labels != IGNORED].tolist() == encoded[index].response
            text = tokenizer.decode(encoded[index].response)  # type: ignore[attr-defined]
            assert text == encoded[index].record.response
    assert (batch.labels[batch.segment < 0] == IGNORED).all()


def test_a_batch_is_a_function_of_its_number() -> None:
    one, two = make_packer(0.3)[0], make_packer(0.3)[0]
    assert one.epoch(3) == two.epoch(3) != one.epoch(4)
    rows = one.epoch(3)[1]
    assert (one.batch(3, 1, rows).ids == two.batch(3, 1, rows).ids).all()
    assert (one.batch(3, 1, rows).ids != one.batch(4, 1, rows).ids).any()


def test_records_over_the_context_are_counted_out() -> None:
    _, encoded, _, too_long = make_packer(positions=24)
    assert too_long > 0
    assert all(len(e.request) + len(e.response) + 5 <= 24 for e in encoded)


def test_the_countdown_is_true_at_every_label() -> None:
    packer, encoded, tokenizer, _ = make_packer(dropout=0.4)
    plan = packer.epoch(0)
    batch = packer.batch(0, 0, plan[0])
    unknown = 0
    for row, indices in enumerate(plan[0]):
        for number, index in enumerate(indices):
            here = (batch.segment[row] == number) & (batch.labels[row] != IGNORED)
            response = encoded[index].response
            words = len(encoded[index].record.response.split())
            assert batch.so_far[row][here][-1] == words  # where END is predicted, all are begun
            for at, so_far in enumerate(batch.so_far[row][here]):
                written = tokenizer.decode(response[:at])  # type: ignore[attr-defined]
                assert so_far == len(written.split())
            left = batch.remaining[row][here]
            unknown += (left == IGNORED).all()
            assert (left == IGNORED).all() or (left == words - batch.so_far[row][here]).all()
    assert unknown > 0  # where dropout took the length
    assert ((batch.so_far == IGNORED) == (batch.labels == IGNORED)).all()
    buckets = tensors(batch, "cpu")["so_far"].numpy()
    assert buckets[batch.so_far == 0].max() == 0
    assert (buckets[batch.so_far >= 1] >= 1).all()


def test_general_text_fills_rows_and_bears_loss_everywhere() -> None:
    _, _, tokenizer, _ = make_packer()
    pieces = encode_text("a long walk by the sea. " * 80, tokenizer, 96)
    assert [len(p.response) for p in pieces[:-1]] == [95] * (len(pieces) - 1)
    packer = Packer(pieces, make_schema(), rows=2, length=96, dropout=0.0, seed=1)
    batch = packer.batch(0, 0, packer.epoch(0)[0])
    assert batch.loss_tokens == sum(len(pieces[i].response) for r in packer.epoch(0)[0] for i in r)
    assert (batch.so_far == IGNORED).all()


def make_schema() -> CommandSchema:
    return CommandSchema(default_axes(["image", "tags"]))
