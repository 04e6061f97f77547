"""Quantisers: error bounds, the saturation they avoid, and what the operator makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edge_slm_converters.arrays import Float32
from edge_slm_converters.blocks import RANGES, TOP_LEVEL, Blocks, block_bytes, bytewise, nearest
from edge_slm_converters.gptq import gptq, gptq_pass, loss
from edge_slm_converters.onnx_writer import MODEL_FILE, GraphWriter
from edge_slm_converters.quantise import BYTE_BLOCK, Quantised

matrices = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 1e-20 else x),
)


def unpacked(blocks: Blocks) -> Float32:
    """The matrix, from the bytes that are written."""
    packed = blocks.packed()
    levels, scale = packed["weight"].astype("f4"), packed["scale"]
    inputs, outputs = blocks.steps.shape
    size = block_bytes(inputs, outputs, blocks.bits, blocks.size)
    assert sum(part.nbytes for part in packed.values()) == size
    if blocks.bits == 4:
        zero = _halves(packed["zero"])[:, : len(blocks.scale), None]
        steps = _halves(packed["weight"]) - zero
    else:
        assert "zero" not in packed
        steps = levels - 128
    padded = (steps * scale[..., None]).reshape(outputs, -1).T
    assert not padded[inputs:].any()  # the padding stays zero
    result: Float32 = padded[:inputs]
    return result


def _halves(packed: np.ndarray) -> Float32:
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1).astype("f4")


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from([16, 32, 64]))
def test_8_bits_are_within_half_a_step(weight: Float32, size: int) -> None:
    blocks = bytewise(weight, size)
    np.testing.assert_array_equal(unpacked(blocks), blocks.matrix())
    assert np.abs(blocks.steps).max() <= 127
    assert np.isfinite(blocks.scale).all()
    assert (blocks.scale > 0).all()
    step = np.repeat(blocks.scale, size, 0)[: len(weight)]
    assert (np.abs(blocks.matrix() - weight) <= step * 0.501).all()


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from([16, 32, 64]))
def test_4_bits_are_no_worse_than_the_plain_scale(weight: Float32, size: int) -> None:
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
    assert not bytewise(zero, 32).matrix().any()
    assert not nearest(zero, 32).matrix().any()
    hot = zero.copy()
    hot[37, 1] = -2.5
    np.testing.assert_allclose(nearest(hot, 32).matrix(), hot, rtol=1e-6)
    np.testing.assert_allclose(bytewise(hot, 32).matrix(), hot, rtol=1e-6)
    moment = np.zeros((40, 40), np.float32)  # inputs that are never used
    moment[37, 37] = 1
    np.testing.assert_allclose(gptq(hot, moment, 32).matrix(), hot, rtol=1e-6)
    assert not gptq(zero, moment, 32).matrix().any()


def multiplied(blocks: Blocks, folder: Path, x: Float32) -> Float32:
    """x [B,S,K] times a matrix, by the operator that ships."""
    import onnxruntime

    inputs, outputs = blocks.steps.shape
    graph = GraphWriter(folder)
    graph.input("x", np.float32, ["B", "S", inputs])
    graph.output("y", np.float32, ["B", "S", outputs])
    y = Quantised("mixed", {"w": blocks}).linear(graph, "x", "w", blocks.matrix())
    graph.node("Identity", [y], "y")
    graph.save("one")
    session = onnxruntime.InferenceSession(
        str(folder / MODEL_FILE), providers=["CPUExecutionProvider"]
    )
    result: Float32 = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize(("inputs", "size"), [(64, 64), (100, 32), (33, 32), (20, 128)])
@pytest.mark.parametrize("quantise", [nearest, bytewise])
def test_the_operator_multiplies_with_these_blocks(
    tmp_path: Path, inputs: int, size: int, quantise: Callable[[Float32, int], Blocks]
) -> None:
    weight = np.random.default_rng(0).standard_normal((inputs, 24)).astype(np.float32)
    blocks = quantise(weight + np.float32(0.3), size)  # 0.3: no zero point in the middle
    # Each input alone: a single value is exact in the operator's int8 activations.
    every = np.eye(inputs, dtype=np.float32)[None]
    np.testing.assert_allclose(multiplied(blocks, tmp_path, every)[0], blocks.matrix(), atol=1e-5)


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
    found = gptq_pass(weight, apart, 32)
    np.testing.assert_array_equal(found.steps, rounded.steps)
    np.testing.assert_allclose(found.scale, rounded.scale, rtol=1e-5)
    least = loss(weight, rounded.matrix(), apart)
    assert loss(weight, gptq(weight, apart, 32).matrix(), apart) <= least


@pytest.mark.parametrize("inputs", [64, 100, 384])
def test_8_bits_give_the_same_bits_however_many_rows(tmp_path: Path, inputs: int) -> None:
    """What prefix caching, batching and speculation rest on."""
    rng = np.random.default_rng(inputs)
    blocks = bytewise(rng.standard_normal((inputs, 40)).astype(np.float32), BYTE_BLOCK)
    x = rng.standard_normal((1, 21, inputs)).astype(np.float32)
    whole = multiplied(blocks, tmp_path, x)
    for width in (1, 2, 3, 8):
        for start in range(0, 21 - width + 1, width):
            (folder := tmp_path / f"{width}-{start}").mkdir()
            part = multiplied(blocks, folder, x[:, start : start + width])
            np.testing.assert_array_equal(part, whole[:, start : start + width])
