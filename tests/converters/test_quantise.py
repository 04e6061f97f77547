"""Quantisers: error bounds and the saturation they avoid."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edge_slm_converters.checkpoint import Float32
from edge_slm_converters.quantise import (
    BLOCK,
    INT4_LIMIT,
    INT8_LIMIT,
    quantise_blocks,
    quantise_columns,
)

matrices = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 1e-20 else x),
)


def unpack(packed: np.ndarray, scale: Float32, inputs: int) -> Float32:
    values = np.stack([packed & 15, packed >> 4], -1).astype(np.float32) - INT4_LIMIT
    blocks = values.reshape(*scale.shape, BLOCK) * scale[..., None]
    result: Float32 = blocks.reshape(len(packed), -1)
    assert not result[:, inputs:].any()  # the padding stays zero
    return result[:, :inputs]


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
@given(matrices)
def test_int4_is_no_worse_than_the_plain_scale(weight: Float32) -> None:
    packed, scale = quantise_blocks(weight)
    rows, inputs = weight.shape
    assert packed.shape == (rows, -(-inputs // BLOCK), BLOCK // 2)
    assert np.isfinite(scale).all()
    restored = unpack(packed, scale, inputs)
    padded = np.pad(weight, ((0, 0), (0, -inputs % BLOCK))).reshape(*scale.shape, BLOCK)
    largest = np.abs(padded).max(-1, keepdims=True)
    plain_step = np.where(largest == 0, 1, largest / (INT4_LIMIT - 1))
    plain = np.rint(padded / plain_step) * plain_step
    ours = np.square(restored - weight).sum()
    assert ours <= np.square(plain - padded).sum() * 1.2 + 1e-6


def test_zero_and_one_hot_matrices_survive() -> None:
    zero = np.zeros((3, 40), np.float32)
    assert not quantise_columns(zero)[0].any()
    packed, scale = quantise_blocks(zero)
    assert not unpack(packed, scale, 40).any()
    hot = zero.copy()
    hot[1, 37] = -2.5
    packed, scale = quantise_blocks(hot)
    np.testing.assert_allclose(unpack(packed, scale, 40), hot, rtol=1e-6)


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
