"""The rule that gives each matrix its bits, and the forward pass that it is measured with."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edge_slm_runtime
from edge_slm_bench.metrics.examples import Scored
from edge_slm_converters import calibration_texts, gguf_writer
from edge_slm_converters.arrays import Float32
from edge_slm_converters.bit_allocation import FORMS, Form, choose, costs, int4, quantised
from edge_slm_converters.blocks import Blocks, bytewise
from edge_slm_converters.calibration import ForwardPass
from edge_slm_converters.calibration_texts import (
    JUDGED_ENDS,
    SAMPLES,
    sample_count,
    sampled_answers,
)
from edge_slm_converters.checkpoint import Checkpoint, read_checkpoint
from edge_slm_converters.gptq import error_feedback_target
from edge_slm_converters.quantise import BYTE_BLOCK, Quantised, step_bytes
from edge_slm_converters.variants import open_variant
from edge_slm_runtime.decoder import Decoder, gpt2

from .conftest import IDS, Original
from .shapes import LLAMA

TEXTS = [Scored(tuple(IDS[start : start + 30]), 9) for start in range(0, 31, 6)]
BITS_8 = Form(8, BYTE_BLOCK)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-4),
        ({"activation_function": "gelu"}, 5e-3),  # computed as its tanh approximation
        ({"activation_function": "relu"}, 1e-4),
        ({"activation_function": "silu"}, 1e-4),
        ({"activation_function": "tanh"}, 1e-4),
        ({"tie_word_embeddings": False, "n_inner": 72, "layer_norm_epsilon": 0.05}, 1e-4),
        ({"scale_attn_by_inverse_layer_idx": True}, 1e-4),
        (LLAMA["two kv heads"], 1e-4),
        (LLAMA["llama3 scaling"], 1e-4),
        (LLAMA["tied"], 1e-4),
        (LLAMA["other heads"], 1e-4),
        (LLAMA["mlp bias"], 1e-4),
        (LLAMA["qwen2"], 1e-4),
    ],
)
def test_forward_pass_is_transformers(
    original: Callable[..., Original], settings: dict[str, object], tolerance: float
) -> None:
    model = original(**settings)
    source = read_checkpoint(model.path)
    ids = tuple(IDS)
    texts = [Scored(ids[:20], 5), Scored(ids, 1)]  # one text does not see the other
    forward = ForwardPass(source.decoder, source.tensors, texts)
    x = forward.embedded()
    for i in range(source.decoder.layers):
        x = forward.layer(i, x)
    logits = forward.logits(x, source.head)
    expected = np.concatenate([model.logits[4:19], model.logits[:-1]])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)


def shape(layers: int = 2, width: int = 256) -> Decoder:
    return gpt2(layers=layers, heads=4, width=width, vocab_size=417, positions=96)


def stored(decoder: Decoder, forms: dict[str, Form]) -> int:
    return sum(forms[name].bytes(*size) for name, size in decoder.matrices().items())


def test_bits_go_where_they_gain_most() -> None:
    decoder = shape()
    even = dict.fromkeys(decoder.matrices(), (0.4, 0.39, 0.38, 0.01))
    least = stored(decoder, dict.fromkeys(even, FORMS[0]))
    assert set(choose(even, decoder, least).values()) == {FORMS[0]}
    assert set(choose(even, decoder, 0).values()) == {FORMS[0]}  # nothing is smaller
    assert set(choose(even, decoder, 10**9).values()) == {BITS_8}

    uneven = even | {"layers.1.up": (40.0, 39.0, 38.0, 1.0)}
    most = least + BITS_8.bytes(256, 1024) - FORMS[0].bytes(256, 1024)
    found = choose(uneven, decoder, most)
    assert found["layers.1.up"] == BITS_8
    assert set(found.values()) == {FORMS[0], BITS_8}
    for limit in range(least, least + 400_000, 50_000):
        assert stored(decoder, choose(uneven, decoder, limit)) <= limit


def test_what_costs_nothing_gets_nothing() -> None:
    decoder = shape()
    free = dict.fromkeys(decoder.matrices(), (0.0, 0.0, 0.0, 0.0))
    assert set(choose(free, decoder, 10**9).values()) == {FORMS[0]}


def test_padding_is_not_taken_for_small() -> None:
    """72 inputs fill 128 places of one block, so blocks of 32 are the smaller form."""
    decoder = shape(1, 72)
    free = dict.fromkeys(decoder.matrices(), (0.0, 0.0, 0.0, 0.0))
    assert choose(free, decoder, 0)["layers.0.out"] == Form(4, 32)


def test_at_98m_the_limit_leaves_room_for_some_in_8_bits() -> None:
    decoder = shape(12, 768)
    head = Quantised("int4").head_bytes(decoder.width, decoder.vocab_size)
    limit = gguf_writer.step_bytes(decoder, "Q4_0") - head
    first = {
        name: (9.0, 8.0, 7.0, 0.1) for name in decoder.matrices() if name.startswith("layers.0.")
    }
    measured = dict.fromkeys(decoder.matrices(), (1.0, 0.9, 0.8, 0.01)) | first
    found = choose(measured, decoder, limit)
    assert limit - 300_000 < stored(decoder, found) <= limit
    in_bytes = [name for name, form in found.items() if form == BITS_8]
    ours = [decoder.matrices()[name] for name in in_bytes if name.startswith("layers.0.")]
    others = [decoder.matrices()[name] for name in in_bytes if not name.startswith("layers.0.")]
    assert sum(k * n for k, n in ours) > 3 * sum(k * n for k, n in others)  # what was left over


def test_costs_are_those_of_one_matrix_alone(tiny_checkpoint: Path) -> None:
    source = read_checkpoint(tiny_checkpoint)
    measured = costs(source, TEXTS)
    assert list(measured) == list(source.decoder.matrices())
    for name, cost in measured.items():
        assert all(c > 0 for c in cost), name
        assert cost[FORMS.index(BITS_8)] < min(cost[:-1]) / 20
        assert cost[2] < cost[1]  # blocks of 32 against blocks of 64
    silent = dict(source.tensors) | {"layers.1.down.weight": np.zeros((256, 64), np.float32)}
    found = costs(type(source)(**{**_fields(source), "tensors": silent}), TEXTS)
    assert set(found["layers.1.down"]) == {0.0}


def _fields(source: object) -> dict[str, object]:
    return {name: getattr(source, name) for name in type(source).__slots__}  # type: ignore[attr-defined]


def outputs(source: Checkpoint, texts: Sequence[Scored]) -> dict[str, Float32]:
    """What each matrix of a model gives, the residual included; and its last residual."""
    forward, found = ForwardPass(source.decoder, source.tensors, texts), {}

    def seen(name: str, x: Float32, residual: Float32 | None) -> Float32:
        found[name] = forward.linear(name, x, residual)
        return found[name]

    x = forward.embedded()
    for i in range(source.decoder.layers):
        x = forward.layer(i, x, seen)
    return found


def in_blocks(source: Checkpoint, blocks: Mapping[str, Blocks]) -> Checkpoint:
    matrices = {f"{name}.weight": b.matrix() for name, b in blocks.items()}
    table = bytewise(source.tensors["embedding"].T, BYTE_BLOCK).matrix().T
    return replace(source, tensors={**source.tensors, **matrices, "embedding": table})


@pytest.mark.parametrize(
    "settings", [{}, {"tie_word_embeddings": False}, LLAMA["two kv heads"], LLAMA["qwen2"]]
)
def test_biases_take_up_what_is_missing(
    original: Callable[..., Original], settings: dict[str, object]
) -> None:
    """On the texts of calibration every matrix gives, in the mean, what it gave before; all
    that was touched are biases and matrices."""
    source = read_checkpoint(original(**settings).path)
    forms = dict.fromkeys(source.decoder.matrices(), Form(4, 32)) | {"layers.0.up": BITS_8}
    fitted, blocks = quantised(source, TEXTS, forms)
    assert {name: Form(b.bits, b.size) for name, b in blocks.items()} == forms
    for name, tensor in source.tensors.items():
        is_bias = name.endswith(".bias") and "norm" not in name
        assert np.array_equal(fitted.tensors[name], tensor) != is_bias, name
    before, after = outputs(source, TEXTS), outputs(in_blocks(fitted, blocks), TEXTS)
    unfitted = outputs(in_blocks(source, blocks), TEXTS)
    for name, wanted in before.items():
        missing = (wanted - after[name]).mean(0)
        assert np.abs(missing).max() < 1e-4 * np.abs(wanted).max(), name
    last = "layers.1.down"
    errors = [float(np.square(before[last] - found[last]).mean()) for found in (after, unfitted)]
    assert errors[0] < errors[1]


def test_the_same_texts_give_the_same_bytes(tiny_checkpoint: Path) -> None:
    source = read_checkpoint(tiny_checkpoint)
    forms = dict.fromkeys(source.decoder.matrices(), Form(4, 64))
    (one, blocks), (other, again) = (quantised(source, TEXTS, forms) for _ in range(2))
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, other.tensors[name])
    for name, b in blocks.items():
        for part, values in b.packed().items():
            np.testing.assert_array_equal(values, again[name].packed()[part])


@given(st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 9))
def test_a_corrected_matrix_is_never_worse(seed: int, inputs: int, outputs: int) -> None:
    """It lies on the way from the float32 matrix to the optimum of a convex loss."""
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(40, inputs)).astype(np.float32)
    x = exact + rng.normal(0, 0.3, exact.shape).astype(np.float32)
    weight = rng.normal(size=(inputs, outputs)).astype(np.float32)
    missing = exact @ weight - x @ weight
    moment = x.T @ x / np.float32(len(x))
    error = x.T @ (missing - missing.mean(0)) / np.float32(len(x))
    found = error_feedback_target(weight, error, moment)

    def lost(matrix: Float32) -> float:
        left = exact @ weight - x @ matrix
        return float(np.square(left - left.mean(0)).mean())

    assert lost(found) <= lost(weight) * (1 + 1e-5) + 1e-9


def test_texts_of_calibration_are_various(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_texts, "SAMPLES", (48, 48))
    monkeypatch.setattr(calibration_texts, "SAMPLE_ROUND", 16)
    source = read_checkpoint(tiny_checkpoint)
    variant = edge_slm_runtime.read_manifest(tiny_bundle).variants[0]
    assert variant.name == "onnx-fp32"
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "judging"))
    grammar = json.loads((copy / "command.json").read_text("utf-8"))
    (copy / "command.json").write_text(json.dumps(grammar | {"confidence": True}))
    with open_variant(tiny_bundle, source, variant) as slm:
        texts, again = (sampled_answers(slm, source) for _ in range(2))
        judged = sampled_answers(slm, read_checkpoint(copy))
    end = source.codec.ends[0]
    assert all(text.ids[-JUDGED_ENDS:] == (end,) * JUDGED_ENDS for text in judged)
    assert all(len(text.ids) <= source.decoder.positions for text in judged)
    assert not any(end in text.ids for text in texts)
    count = sample_count(source.decoder, source.parameters)
    assert count // 2 < len(texts) <= count
    assert len({text.ids[: text.prompt] for text in texts}) > len(texts) / 2
    assert all(0 < text.prompt < len(text.ids) <= source.decoder.positions for text in texts)
    assert texts == again


def test_texts_are_as_many_as_are_worth_their_time() -> None:
    shapes = ((2, 16), (2, 64), (5, 384), (12, 512), (12, 768))
    decoders = [shape(layers, width) for layers, width in shapes]
    counts = [sample_count(d, sum(map(math.prod, d.shapes().values()))) for d in decoders]
    assert counts[:2] == [SAMPLES[0], 3 * 64]
    assert counts[2:] == sorted(counts[2:], reverse=True)
    assert SAMPLES[0] <= counts[-1] < 1.5 * SAMPLES[0]


def test_the_manifest_says_what_was_chosen(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    source = read_checkpoint(tiny_checkpoint)
    manifest = edge_slm_runtime.read_manifest(tiny_bundle)
    record = manifest.provenance["quantisation"]["int4"]
    assert record["method"].startswith("gptq")
    assert record["texts"] > 50
    assert list(record["matrices"]) == list(source.decoder.matrices())
    for chosen in record["matrices"].values():
        assert Form(chosen["bits"], chosen["block"]) in FORMS
        assert chosen["kl"] >= 0
    variant = next(v for v in manifest.variants if v.name == "onnx-int4")
    _, precision, again = int4(source, TEXTS)
    assert set(again["matrices"]) == set(record["matrices"])
    # At this width even the smallest forms may be more than Q4_0.
    least = min(form.bytes(64, 64) for form in FORMS) / (64 * 64)
    most = max(4.5 / 8, least)
    in_layers = sum(k * n for k, n in source.decoder.matrices().values())
    head = precision.head_bytes(source.decoder.width, source.decoder.vocab_size)
    for stored in (variant.weight_bytes_per_token, step_bytes(source.decoder, precision)):
        assert stored - head <= most * in_layers + 1
