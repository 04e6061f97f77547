"""Functions and attention as compiled, against numpy. Products: `test_product`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import erf
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_slm_runtime.decoder import ACTIVATIONS
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.panels import LANES, UNIT

from .test_product import GUARD, floats

Array = NDArray[Any]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 600), st.integers(1, 9), st.randoms(use_true_random=False))
def test_pieces_are_all_there_once(units: int, threads: int, random: Random) -> None:
    """Whichever thread comes next, and however many never come."""
    from edge_slm_runtime.kernels.schedule import claimed

    claims = np.zeros(1, np.int64)
    found: list[int] = []
    last = dict.fromkeys(range(random.randint(1, threads)), (0, 0))
    while last:
        thread = random.choice(list(last))
        number, first, end = claimed(claims.ctypes.data, *last[thread], units, threads)
        if first < units:
            found += range(first, end)
            last[thread] = number, first
        else:
            assert first == units
            del last[thread]
    assert sorted(found) == list(range(units))


def test_exp() -> None:
    """Held between -87 and 88."""
    from edge_slm_runtime.kernels.native import exp, jit

    @jit
    def every(x: Any, out: Any) -> None:
        for i in range(len(x)):
            out[i] = exp(x[i])

    x = np.concatenate([np.linspace(-200, 200, 400_001), [-3e38, 3e38, 0.0, -0.0, 1e-30]])
    x = x.astype(np.float32)
    found = np.zeros_like(x)
    every(x, found)
    np.testing.assert_allclose(found, np.exp(np.clip(x.astype(float), -87, 88)), rtol=5e-7)
    assert found[x == 0].tolist() == [1, 1, 1]


def gelu_tanh(x: Array) -> Array:
    result: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return result


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(erf)(x * np.sqrt(0.5))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: np.where(x > -700, x / (1 + np.exp(-np.maximum(x, -700))), 0),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    """Of these panels only, with the bias, and far out too."""
    from edge_slm_runtime.kernels.layers import activate

    large = [s * x for s in (-1, 1) for x in (9, 11, 12, 12.5, 20, 87, 88, 89, 100, 1e3, 1e4, 1e10)]
    near = np.linspace(-12, 12, 192 * 3 - len(large))
    x = np.concatenate([near, large]).astype(np.float32).reshape(3, 192)
    bias = floats(np.random.default_rng(2), 192)
    found = x.copy()
    kind = ACTIVATIONS.index(name)
    activate(found.ctypes.data, 3, 192, bias.ctypes.data, 2, 12, kind)
    expected = FUNCTIONS[name]((x + bias).astype(np.float64))
    np.testing.assert_array_equal(found[:, :32], x[:, :32])
    np.testing.assert_allclose(found[:, 32:], expected[:, 32:], rtol=2e-6, atol=2e-6)


def test_tests_know_every_activation() -> None:
    assert tuple(FUNCTIONS) == ACTIVATIONS


@pytest.mark.parametrize("width", [8, 64, 72, 768])
@pytest.mark.parametrize("offset", [0, 50])
def test_layer_norm(width: int, offset: int) -> None:
    from edge_slm_runtime.kernels.layers import normalise

    rng = np.random.default_rng(width)
    x, weight, bias = (
        floats(rng, 3, width) + np.float32(offset),
        floats(rng, width),
        floats(rng, width),
    )
    out = np.zeros_like(x)
    epsilon = np.float32(1e-5)
    for row in range(3):
        places = (weight.ctypes.data, bias.ctypes.data, epsilon, out.ctypes.data)
        normalise(x.ctypes.data, row, width, *places)
    exact = x.astype(np.float64)
    centred = exact - exact.mean(1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + epsilon)
    np.testing.assert_allclose(out, expected * weight + bias, rtol=0, atol=1e-4 if offset else 1e-5)


@pytest.mark.parametrize("width", [8, 64, 72, 576])
def test_rms_norm(width: int) -> None:
    from edge_slm_runtime.kernels.layers import rms_normalise

    rng = np.random.default_rng(width)
    x, weight, epsilon = floats(rng, 3, width), floats(rng, width), np.float32(1e-5)
    out = np.zeros_like(x)
    for row in range(3):
        rms_normalise(x.ctypes.data, row, width, weight.ctypes.data, epsilon, out.ctypes.data)
    exact = x.astype(np.float64)
    expected = exact / np.sqrt(np.square(exact).mean(1, keepdims=True) + epsilon) * weight
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gate(name: str) -> None:
    """The panels of the gate and of what it multiplies alternate; only those asked for."""
    from edge_slm_runtime.kernels.layers import gate

    rng = np.random.default_rng(3)
    x, bias = floats(rng, 3, 192), floats(rng, 192)
    out = np.full((3, 96), GUARD, np.float32)
    values, kind = x.copy(), ACTIVATIONS.index(name)
    gate(values.ctypes.data, 3, 192, bias.ctypes.data, 2, 10, kind, out.ctypes.data)
    panels = (x + bias).astype(np.float64).reshape(3, 6, 2, 16)
    expected = (FUNCTIONS[name](panels[:, :, 0]) * panels[:, :, 1]).reshape(3, 96)
    np.testing.assert_allclose(out[:, 16:80], expected[:, 16:80], rtol=2e-6, atol=2e-6)
    assert (np.delete(out, np.s_[16:80], 1) == GUARD).all()


def test_bias_and_residual() -> None:
    from edge_slm_runtime.kernels.layers import add_bias, add_to

    rng = np.random.default_rng(6)
    values, bias, x = floats(rng, 3, 128), floats(rng, 128), floats(rng, 3, 72)
    biased, residual = values.copy(), x.copy()
    add_bias(biased.ctypes.data, 3, 128, bias.ctypes.data, 2, 6)
    np.testing.assert_array_equal(biased[:, 32:96], (values + bias)[:, 32:96])
    np.testing.assert_array_equal(biased[:, :32], values[:, :32])
    np.testing.assert_array_equal(biased[:, 96:], values[:, 96:])
    add_to(residual.ctypes.data, 3, 72, values.ctypes.data, 128, bias.ctypes.data, 2, 8)
    np.testing.assert_array_equal(residual[:, :32], x[:, :32])
    np.testing.assert_allclose(
        residual[:, 32:], (x + values[:, :72] + bias[:72])[:, 32:], rtol=1e-5
    )


# -- attention -------------------------------------------------------------------------

HEADS, POSITIONS, ROWS = 3, 48, 3


@cache
def made_attend(stored: bool) -> Callable[..., None]:
    from edge_slm_runtime.kernels.attention import make_attend

    return make_attend(stored)


def keys_in_blocks(keys: Array) -> Array:
    """[.., positions, size] → as the kernels keep keys: [.., positions / 16, size, 16]."""
    *rows, positions, size = keys.shape
    return keys.reshape(*rows, positions // LANES, LANES, size).swapaxes(-1, -2)


def rotated(x: Array, angles: Array) -> Array:
    """x [heads, new, size], angles [new, size / 2]; as transformers' `rotate_half` does it."""
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
    both = np.concatenate([angles, angles], -1)
    mixed: Array = x * np.cos(both) + turned * np.sin(both)
    return mixed


@pytest.mark.parametrize("size", [64, 8, 20, 128])
@pytest.mark.parametrize("kept_only", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 3])
@pytest.mark.parametrize(
    ("widths", "kept", "starts"),
    [
        ((1, 1), (1, 1), (0, 39)),
        ((5, 5), (5, 5), (0, 7)),
        ((9, 3), (2, 1), (31, 3)),
        ((40, 1), (1, 1), (0, 0)),
        ((6, 33), (3, 30), (4, 0)),
    ],
)
def test_attention(
    size: int,
    kept_only: bool,
    shared: int,
    widths: tuple[int, int],
    kept: tuple[int, int],
    starts: tuple[int, int],
) -> None:
    """New keys and values go to their places in half precision; every query sees those up to
    its own, and none after. Two answers, in the rows 2 and 0 of three. shared: key-value heads
    of rotary attention; 0 is GPT-2's attention."""
    rng, layer, rows = np.random.default_rng(size), 1, (2, 0)
    kv_heads = shared or HEADS
    width, columns = HEADS * size, (HEADS + 2 * kv_heads) * size
    stride = -(-columns // UNIT) * UNIT
    firsts, asked = (0, widths[0]), kept if kept_only else widths
    wide = floats(rng, sum(widths), stride)
    given_qkv = wide.astype(np.float64)
    angles = rng.uniform(0, 7, (POSITIONS, size // 2)) if shared else np.zeros((POSITIONS, 0))
    turns = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    before = rng.normal(size=(4, ROWS, kv_heads, POSITIONS, size)).astype(np.float16)
    for row, start in zip(rows, starts, strict=True):
        before[:, row, :, start:] = np.nan
    cache = before.copy()
    cache[::2] = keys_in_blocks(before[::2]).reshape(before[::2].shape)
    out = np.full((sum(asked) + 1, width), GUARD, np.float32)
    scores = np.full((2, t.QUERIES, POSITIONS), GUARD, np.float32)  # of two threads
    places, parts = np.array(starts, np.int64), np.zeros((2, t.PART), np.int64)
    parts[:, t.ROW], parts[:, t.FIRST], parts[:, t.NEW] = rows, firsts, widths
    parts[:, t.KEPT], parts[:, t.FIRST_KEPT] = kept, (0, kept[0])
    table, job, model = (np.zeros(n, np.int64) for n in (t.TABLE, t.PASS, t.FIRST_LAYER))
    table[t.PRODUCT], table[t.ATTENDED] = wide.ctypes.data, out.ctypes.data
    table[t.SCORES], table[t.JOB] = scores.ctypes.data, job.ctypes.data
    table[t.MODEL] = model.ctypes.data
    job[t.ANSWERS], job[t.CACHE_ROWS], job[t.CACHE] = 2, ROWS, cache.ctypes.data
    job[t.STARTS], job[t.PARTS] = places.ctypes.data, parts.ctypes.data
    model[t.HEADS], model[t.KV_HEADS], model[t.HEAD_WIDTH] = HEADS, kv_heads, size
    model[t.POSITIONS], model[t.POSITION_TABLE] = POSITIONS, turns.ctypes.data
    if shared:
        from edge_slm_runtime.kernels.attention import store_keys_and_values

        for thread in range(5):
            store_keys_and_values(table, layer, stride, thread, 5)
    attend = made_attend(bool(shared))
    for answer in range(2):
        for head in range(HEADS):
            attend(table, answer, layer, head, stride, kept_only, 1)
    stored, found = cache.copy(), 0
    blocked = cache[::2].reshape(2, ROWS, kv_heads, POSITIONS // LANES, size, LANES)
    stored[::2] = blocked.swapaxes(-1, -2).reshape(stored[::2].shape)
    for first, new, wanted, row, start in zip(firsts, widths, asked, rows, starts, strict=True):
        parted = given_qkv[first : first + new, :columns].reshape(new, -1, size).swapaxes(0, 1)
        q, k, v = np.split(parted, [HEADS, HEADS + kv_heads])  # [heads, new, size]
        if shared:
            q, k = (rotated(x, angles[start : start + new]) for x in (q, k))
        q, k, v = (x.astype(np.float32) for x in (q, k, v))
        before[2, row, :, start : start + new] = k
        before[3, row, :, start : start + new] = v
        for i in range(new - wanted, new):
            keys, values = (
                np.repeat(part, HEADS // kv_heads, 0)
                for part in stored[2:, row, :, : start + i + 1].astype(np.float64)
            )
            weights = np.einsum("hd,hjd->hj", q[:, i], keys)
            weights = np.exp(weights - weights.max(1, keepdims=True))
            expected = np.einsum("hj,hjd->hd", weights, values) / weights.sum(1, keepdims=True)
            np.testing.assert_allclose(out[found], expected.ravel(), rtol=0, atol=5e-5)
            found += 1
    assert (out[found:] == GUARD).all()
    if shared:  # a rotation may be rounded to the half above or below
        np.testing.assert_allclose(stored, before, rtol=1e-3, atol=1e-4)
    else:
        np.testing.assert_array_equal(stored, before)
    assert (scores[0] == GUARD).all()


def test_half_precision_is_numpys() -> None:
    """All 65536 halves, and floats between them."""
    from edge_slm_runtime.kernels.native import jit, to_float, to_half

    @jit
    def there(x: Any, out: Any) -> None:
        for i in range(len(x)):
            out[i] = to_float(x[i])

    @jit
    def back(x: Any, out: Any) -> None:
        for i in range(len(x)):
            out[i] = to_half(x[i])

    every = np.arange(1 << 16, dtype=np.uint16)
    every = every[np.isfinite(every.view(np.float16))]
    found = np.zeros(len(every), np.float32)
    there(every, found)
    np.testing.assert_array_equal(found, every.view(np.float16).astype(np.float32))
    rng = np.random.default_rng(1)
    values = (floats(rng, 100_000) * 10.0 ** rng.uniform(-9, 4, 100_000)).astype(np.float32)
    halves = np.zeros(len(values), np.uint16)
    back(values, halves)
    np.testing.assert_array_equal(halves.view(np.float16), values.astype(np.float16))


@pytest.mark.parametrize("more", [False, True])
def test_fold(more: bool) -> None:
    """Of any number of values, and nothing beside the 16 floats."""
    from edge_slm_runtime.kernels.heads import make_fold
    from edge_slm_runtime.kernels.native import jit

    kernel = make_fold(more)

    @jit
    def fold(weights: int, values: int, count: int, out: int) -> None:
        kernel(weights, values, count, out)

    rng = np.random.default_rng(4)
    for count in (0, 1, 2, 3, 4, 5, 7, 8, 31, 768):
        weights, values = floats(rng, count), floats(rng, count, LANES).astype(np.float16)
        out = np.full(LANES + 2, GUARD, np.float32)
        fold(weights.ctypes.data, values.ctypes.data, count, out[1:].ctypes.data)
        expected = weights.astype(float) @ values.astype(float) + (GUARD if more else 0)
        np.testing.assert_allclose(out[1:-1], expected, atol=1e-6 * (10 + count))
        assert out[0] == out[-1] == GUARD
