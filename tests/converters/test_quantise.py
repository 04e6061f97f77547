"""Quantisers: error bounds, the saturation they avoid, and what the operator makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edge_slm_converters.blocks import RANGES, TOP_LEVEL, Blocks, block_bytes, nearest
from edge_slm_converters.checkpoint import Float32
from edge_slm_converters.gptq import carried, gptq, loss
from edge_slm_converters.onnx_writer import MODEL_FILE, GraphWriter
from edge_slm_converters.quantise import INT8_LIMIT, Int4, quantise_columns

matrices = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 1e-20 else x),
)


def unpacked(blocks: Blocks) -> Float32:
    """The matrix, from the bytes that are written."""
    levels, scale, zero = blocks.packed()
    inputs, outputs = blocks.steps.shape
    steps = _halves(levels) - _halves(zero)[:, : len(blocks.scale), None]
    assert levels.nbytes + scale.nbytes + zero.nbytes == block_bytes(inputs, outputs, blocks.size)
    padded = (steps * scale[..., None]).reshape(outputs, -1).T
    assert not padded[inputs:].any()  # the padding stays zero
    result: Float32 = padded[:inputs]
    return result


def _halves(packed: np.ndarray) -> Float32:
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1).astype("f4")


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_int8_is_within_half_a_step(weight: Float32) -> None:
    quantised, scale = quantise_columns(weight)
    assert quantised.dtype == np.int8
    assert np.abs(quantised).max() <= INT8_LIMIT
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    error = np.abs(quantised * scale - weight)
    assert (error <= scale * 0.501).all()


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from([16, 32, 64]))
def test_int4_is_no_worse_than_the_plain_scale(weight: Float32, size: int) -> None:
    blocks = nearest(weight, size)
    np.testing.assert_array_equal(unpacked(blocks), blocks.matrix())
    assert np.isfinite(blocks.scale).all()
    assert (blocks.scale > 0).all()
    assert blocks.zero.min() >= 0
    assert blocks.zero.max() <= TOP_LEVEL
    plain = nearest(weight, size, ranges=RANGES[-1:])
    ours, theirs = (np.square(b.matrix() - weight).sum() for b in (blocks, plain))
    assert ours <= theirs * 1.0001 + 1e-6
    low, high = np.minimum(weight.min(0), 0), np.maximum(weight.max(0), 0)
    step = (high - low) / TOP_LEVEL  # of a whole column: no block's is coarser
    assert (np.square(plain.matrix() - weight).mean(0) <= np.square(step) + 1e-9).all()


def test_zero_and_one_hot_matrices_survive() -> None:
    zero = np.zeros((40, 3), np.float32)
    assert not quantise_columns(zero)[0].any()
    assert not nearest(zero, 32).matrix().any()
    hot = zero.copy()
    hot[37, 1] = -2.5
    np.testing.assert_allclose(nearest(hot, 32).matrix(), hot, rtol=1e-6)
    moment = np.zeros((40, 40), np.float32)  # inputs that are never used
    moment[37, 37] = 1
    np.testing.assert_allclose(gptq(hot, moment, 32).matrix(), hot, rtol=1e-6)
    assert not gptq(zero, moment, 32).matrix().any()


@pytest.mark.parametrize(("inputs", "size"), [(64, 64), (100, 32), (33, 32), (20, 128)])
def test_the_operator_multiplies_with_these_blocks(
    tmp_path: Path, inputs: int, size: int
) -> None:
    import onnxruntime

    weight = np.random.default_rng(0).standard_normal((inputs, 24)).astype(np.float32)
    blocks = nearest(weight + np.float32(0.3), size)  # 0.3: no zero point in the middle
    graph = GraphWriter(tmp_path)
    x = graph.input("x", np.float32, [1, "S", inputs])
    graph.output("y", np.float32, [1, "S", 24])
    y = Int4({"w": blocks}).linear(graph, x, "w", weight)
    graph.node("Identity", [y], "y")
    graph.save("one")
    session = onnxruntime.InferenceSession(
        str(tmp_path / MODEL_FILE), providers=["CPUExecutionProvider"]
    )
    # Each input alone: a single value is exact in the operator's int8 activations.
    every = np.eye(inputs, dtype=np.float32)[None]
    np.testing.assert_allclose(session.run(None, {"x": every})[0][0], blocks.matrix(), atol=1e-5)


def correlated(inputs: int, seed: int) -> Float32:
    """The second moment of inputs that go together, as activations do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * inputs, 8)) @ rng.standard_normal((8, inputs))
    x += 0.3 * rng.standard_normal(x.shape) + rng.standard_normal(inputs)
    result: Float32 = (x.T @ x / len(x)).astype(np.float32)
    return result


@pytest.mark.parametrize(("inputs", "size"), [(96, 32), (100, 64), (40, 128)])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_loses_less_than_rounding(inputs: int, size: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((inputs, 50)).astype(np.float32)
    moment = correlated(inputs, seed)
    ours = gptq(weight, moment, size)
    np.testing.assert_array_equal(unpacked(ours), ours.matrix())
    rounded = nearest(weight, size).matrix()
    # Measured: 0.2 … 0.4 of it.
    assert loss(weight, ours.matrix(), moment) < 0.6 * loss(weight, rounded, moment)


def test_gptq_of_unrelated_inputs_is_rounding() -> None:
    weight = np.random.default_rng(1).standard_normal((96, 30)).astype(np.float32)
    apart = np.eye(96, dtype=np.float32)
    rounded = nearest(weight, 32)
    found = carried(weight, apart, 32)
    np.testing.assert_array_equal(found.steps, rounded.steps)
    np.testing.assert_allclose(found.scale, rounded.scale, rtol=1e-5)
    least = loss(weight, rounded.matrix(), apart)
    assert loss(weight, gptq(weight, apart, 32).matrix(), apart) <= least


def test_saturation_is_rarer_at_our_limit() -> None:
    """Pairs of products in a saturating 16-bit sum, as AVX2 without VNNI adds them."""
    rng = np.random.default_rng(0)
    x = np.clip(np.rint(rng.standard_normal((256, 512)) * 127 / 3.5) + 128, 1, 255)
    w = rng.standard_normal((512, 64))

    def error(limit: int) -> float:
        scale = np.abs(w).max(0) / limit
        q = np.rint(w / scale)
        pairs = x[:, 0::2, None] * q[None, 0::2] + x[:, 1::2, None] * q[None, 1::2]
        exact = pairs.sum(1)
        saturated = np.clip(pairs, -32768, 32767).sum(1)
        return float(np.square((saturated - exact) * scale).mean())

    assert error(64) == 0
    assert error(INT8_LIMIT) < error(127) / 20
