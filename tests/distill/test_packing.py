from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from edge_slm.distill.cuts import sentence_ends
from edge_slm.distill.hindsight import Record, build_schema, relabel
from edge_slm.distill.levels import level_edges
from edge_slm.distill.model import fresh_model
from edge_slm.distill.objective import attention_mask, tensors
from edge_slm.distill.packing import IGNORED, Encoded, Packer, encode_records, encode_text
from edge_slm.distill.recipe import ModelRecipe
from edge_slm.distill.tokenizer import train_tokenizer
from edge_slm_runtime.command import Command, CommandSchema, default_axes

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


@pytest.mark.parametrize(
    ("sentences", "fault", "index"),
    [
        (["A fox."], 0, 0),
        (["A fox ran."], None, None),
        (
            [
                "A fox.",
                "It ran",
            ],
            1,
            1,
        ),
        (["A sign reads “Home.”", "Rain fell.", "“Go!” he said."], 2, 2),
        (["A 🦊.", "Zwei Füchse…", "東京 の。", "It ran."], 0, 0),
    ],
)
def test_sentences_in_tokens(sentences: list[str], fault: int | None, index: int | None) -> None:
    text = " ".join(sentences)
    schema = CommandSchema(default_axes(["image"]))
    tokenizer = train_tokenizer([text], schema, 300)
    bad = sentences[fault] if fault is not None else ""
    record = Record("a request", text, Command("image", 9), fault=bad)
    (encoded,), _ = encode_records([record], tokenizer, schema, 128)
    starts = [0, *encoded.sentences]
    found = [tokenizer.decode(encoded.response[a:b]).strip() for a, b in pairwise(starts)]
    assert found == [text[a:b].strip() for a, b in pairwise([0, *sentence_ends(text)])]
    assert encoded.sentences[-1] == len(encoded.response) - 1
    assert encoded.fault == index
    assert tokenizer.decode(encoded.response[encoded.compared(0)]).strip() == (
        bad or tokenizer.decode(encoded.response)
    )


@pytest.mark.parametrize(
    ("fault", "alike", "compared"),
    [
        *((None, 0, (0, 10)), (None, 4, (4, 10))),
        *((0, 0, (0, 3)), (0, 2, (2, 3)), (0, 3, (3, 10))),  # 3: the fault is in both
        *((1, 0, (3, 7)), (1, 5, (5, 7)), (2, 1, (7, 9)), (2, 8, (8, 9))),
    ],
)
def test_what_is_compared(fault: int | None, alike: int, compared: tuple[int, int]) -> None:
    encoded = Encoded([1], [*range(10)], None, [], (3, 7, 9), fault)
    assert encoded.compared(alike) == slice(*compared)


def test_sentences_that_are_judged() -> None:
    def judged(fault: int | None, is_best: int) -> dict[int, int]:
        return Encoded([1], [*range(10)], None, [], (3, 7, 9), fault).judged(is_best)

    assert judged(None, 1) == {3: 1, 7: 1}
    assert judged(None, 0) == {}
    assert [judged(fault, 0) for fault in (0, 1, 2)] == [{3: 0}, {3: 1, 7: 0}, {3: 1, 7: 1}]
    assert Encoded([1], [1, 2, 0], None, [], (2,), 0).judged(0) == {}


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
