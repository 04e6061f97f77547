"""The compiled kernels against numpy, one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import erf
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_slm_runtime.kernels import tables as t
from edge_slm_runtime.kernels.compiled import has_vnni
from edge_slm_runtime.panels import ALIGNMENT, LANES, UNIT, pack_levels, pack_outputs

Array = NDArray[Any]
Product = Callable[..., None]
GUARD = 7.5  # stands where nothing may be written


def aligned(values: Array) -> Array:
    """A copy on the boundary of a vector, as the weights lie in memory."""
    room = np.zeros(values.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    found = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    found[...] = values
    return found


def floats(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return rng.normal(0, scale, shape).astype(np.float32)


@dataclass
class Matrix:
    """Random weights, and how the kernels see them."""

    table: Array
    levels: Array  # [K,N], K and N filled up
    scale: Array  # [blocks, N]
    zero: Array  # likewise
    size: int
    kept: list[Array]

    @classmethod
    def random(cls, seed: int, inputs: int, outputs: int, bits: int, size: int) -> Matrix:
        rng = np.random.default_rng(seed)
        blocks, padded = -(-inputs // size), -(-outputs // UNIT) * UNIT
        levels = rng.integers(0, 2**bits, (blocks * size, padded), np.uint8)
        levels[:, ::7], levels[:, 1::7] = 0, 2**bits - 1  # the largest sums
        zero = rng.integers(0, 16, (blocks, padded), np.uint8)
        scale = floats(rng, blocks, padded)
        kept = [
            aligned(pack_levels(levels, bits, size)),
            aligned(pack_outputs(scale)),
            aligned(pack_outputs(zero)),
        ]
        table = np.zeros(t.MATRIX, np.int64)
        for place, part in zip((t.LEVEL, t.SCALE, t.ZERO), kept, strict=True):
            table[place] = part.ctypes.data
        table[t.BLOCKS], table[t.SIZE], table[t.BITS] = blocks, size, bits
        table[t.PANELS] = padded // LANES
        if bits == 8:
            zero = np.full_like(zero, 128)
        return cls(table, levels, scale, zero, size, kept)

    def times(self, q: Array, a: Array) -> Array:
        """By the formula of `kernels.tile`, in its order: q [rows,K], a [rows, blocks]."""
        total = np.zeros((len(q), self.scale.shape[1]), np.float32)
        for block in range(len(self.scale)):
            part = slice(block * self.size, (block + 1) * self.size)
            steps = self.levels[part].astype(np.int64) - self.zero[block]
            count = (q[:, part].astype(np.int64) @ steps).astype(np.float32)
            factor = a[:, block, None] * self.scale[block]
            # A fused multiply-add: float64 holds the product.
            total = (count.astype(np.float64) * factor + total).astype(np.float32)
        return total


@dataclass
class Rounded:
    q: Array
    a: Array
    sums: Array


def rounded(x: Array, matrix: Matrix) -> Rounded:
    """Rows of activations, by the kernel."""
    from edge_slm_runtime.kernels.product import quantise

    rows, width = x.shape
    blocks = len(matrix.scale)
    found = Rounded(
        np.full((rows, blocks * matrix.size), 99, np.int8),
        np.zeros((rows, blocks), np.float32),
        np.zeros((rows, blocks), np.int32),
    )
    for row in range(rows):
        places = (array.ctypes.data for array in (found.q, found.a, found.sums))
        quantise(x.ctypes.data, row, width, width, matrix.table, 0, blocks, *places)
    return found


def multiplied(product: Product, matrix: Matrix, x: Rounded, first: int, last: int) -> Array:
    rows, stride = len(x.q), matrix.scale.shape[1] + 3
    out = np.full((rows, stride), GUARD, np.float32)
    product(
        *(matrix.table, x.q.ctypes.data, x.a.ctypes.data, x.sums.ctypes.data),
        *(rows, out.ctypes.data, stride, first, last),
    )
    assert (out[:, : first * LANES] == GUARD).all()
    assert (out[:, last * LANES :] == GUARD).all()
    return out[:, first * LANES : last * LANES]


# -- products --------------------------------------------------------------------


@pytest.fixture(scope="module")
def portable() -> Product:
    from edge_slm_runtime.kernels.product import make_product

    return make_product(vnni=False)


@pytest.fixture(scope="module")
def product(portable: Product) -> Product:
    """As this processor runs it."""
    from edge_slm_runtime.kernels.product import make_product

    return make_product(vnni=True) if has_vnni() else portable


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (200, 100), (5, 3), (384, 192)])
def test_product(product: Product, bits: int, size: int, inputs: int, outputs: int) -> None:
    matrix = Matrix.random(bits * size, inputs, outputs, bits, size)
    x = rounded(floats(np.random.default_rng(1), 19, inputs), matrix)
    panels = matrix.scale.shape[1] // LANES
    whole = matrix.times(x.q, x.a)
    for rows in (*range(1, 13), 19):  # tiles take 1, 2, 4 and 8 rows
        some = Rounded(x.q[:rows], x.a[:rows], x.sums[:rows])
        np.testing.assert_array_equal(multiplied(product, matrix, some, 0, panels), whole[:rows])
    np.testing.assert_array_equal(
        multiplied(product, matrix, x, 2, 4), whole[:, 2 * LANES : 4 * LANES]
    )


@pytest.mark.skipif(not has_vnni(), reason="this processor has no such instruction")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_portable_product_gives_the_same_bits(
    product: Product, portable: Product, bits: int
) -> None:
    for size in (32, 64, 128):
        matrix = Matrix.random(size, 300, 128, bits, size)
        x = rounded(floats(np.random.default_rng(size), 15, 300, scale=30), matrix)
        fast, slow = (multiplied(one, matrix, x, 0, 8) for one in (product, portable))
        np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums_are_exact(product: Product, bits: int) -> None:
    """All activations at the end of their range, so that nothing may saturate."""
    matrix = Matrix.random(3, 256, 64, bits, 128)
    x = floats(np.random.default_rng(3), 4, 256)
    x = rounded(np.sign(x) * np.float32([[1], [9], [1e-20], [1e20]]), matrix)
    assert set(np.unique(x.q)) == {-127, 127}
    np.testing.assert_array_equal(multiplied(product, matrix, x, 0, 4), matrix.times(x.q, x.a))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_rows_of_the_embedding(size: int) -> None:
    from edge_slm_runtime.kernels.product import unpack

    matrix = Matrix.random(size, 150, 200, 8, size)
    weights = (matrix.levels.astype(np.float32) - 128) * np.repeat(matrix.scale, size, 0)
    for output in (0, 1, 15, 16, 17, 199):
        out = np.zeros(150, np.float32)
        unpack(matrix.table, output, out)
        np.testing.assert_array_equal(out, weights[:150, output])


# -- activations in 8 bits ---------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 200),
    st.sampled_from([32, 64, 128]),
    st.floats(-44, 38),
    st.floats(0, 1),
)
def test_quantise(seed: int, width: int, size: int, power: float, zeros: float) -> None:
    """To half a step, whatever the magnitude; blocks of nothing but zeros, and what fills the
    last one, are zeros."""
    rng = np.random.default_rng(seed)
    matrix = Matrix.random(0, width, 16, 8, size)
    blocks = len(matrix.scale)
    x = np.zeros((2, blocks * size), np.float32)
    x[:, :width] = rng.uniform(-1, 1, (2, width)) * 10.0**power
    x.reshape(2, blocks, size)[rng.random((2, blocks)) < zeros] = 0
    found = rounded(np.ascontiguousarray(x[:, :width]), matrix)
    parts, q = x.reshape(2, blocks, size), found.q.reshape(2, blocks, size)
    np.testing.assert_array_equal(found.sums, q.sum(2))
    np.testing.assert_array_equal(q[parts == 0], 0)
    assert np.abs(q.astype(int)).max(initial=0) <= 127
    largest = np.abs(parts).max(2)
    error = np.abs(parts - q * found.a[..., None].astype(np.float64)).max(2)
    # A block of tiny values may become zeros.
    assert (error <= np.where(largest > 1e-30, largest / 127 * 0.5001, largest)).all()


def test_a_block_is_rounded_without_the_others() -> None:
    from edge_slm_runtime.kernels.product import quantise

    matrix = Matrix.random(0, 320, 16, 8, 64)
    x = floats(np.random.default_rng(4), 1, 320)
    whole, part = rounded(x, matrix), Rounded(*(np.zeros((1, n), k) for n, k in KINDS))
    places = [array.ctypes.data for array in (part.q, part.a, part.sums)]
    quantise(x.ctypes.data, 0, 320, 320, matrix.table, 2, 4, *places)
    np.testing.assert_array_equal(part.q[0, 128:256], whole.q[0, 128:256])
    np.testing.assert_array_equal(part.a[0, 2:4], whole.a[0, 2:4])
    assert not part.q[0, :128].any()
    assert not part.q[0, 256:].any()
    assert not part.sums[0, [0, 1, 4]].any()


KINDS: tuple[tuple[int, Any], ...] = ((320, np.int8), (5, np.float32), (5, np.int32))


# -- functions -----------------------------------------------------------------------


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


@pytest.mark.parametrize("name", t.ACTIVATIONS)
def test_activation(name: str) -> None:
    """Of these panels only, with the bias, and far out too."""
    from edge_slm_runtime.kernels.layers import activate

    large = [s * x for s in (-1, 1) for x in (9, 11, 12, 12.5, 20, 87, 88, 89, 100, 1e3, 1e4, 1e10)]
    near = np.linspace(-12, 12, 192 * 3 - len(large))
    x = np.concatenate([near, large]).astype(np.float32).reshape(3, 192)
    bias = floats(np.random.default_rng(2), 192)
    found = x.copy()
    kind = t.ACTIVATIONS.index(name)
    activate(found.ctypes.data, 3, 192, bias.ctypes.data, 2, 12, kind)
    expected = FUNCTIONS[name]((x + bias).astype(np.float64))
    np.testing.assert_array_equal(found[:, :32], x[:, :32])
    np.testing.assert_allclose(found[:, 32:], expected[:, 32:], rtol=2e-6, atol=2e-6)


def test_tests_know_every_activation() -> None:
    assert tuple(FUNCTIONS) == t.ACTIVATIONS


@pytest.mark.parametrize("width", [8, 64, 72, 768])
@pytest.mark.parametrize("offset", [0, 50])
def test_layer_norm(width: int, offset: int) -> None:
    from edge_slm_runtime.kernels.layers import normalise

    rng = np.random.default_rng(width)
    x, weight, bias = floats(rng, 3, width) + np.float32(offset), floats(rng, width), floats(rng, width)
    out = np.zeros_like(x)
    epsilon = np.float32(1e-5)
    for row in range(3):
        places = (weight.ctypes.data, bias.ctypes.data, epsilon, out.ctypes.data)
        normalise(x.ctypes.data, row, width, *places)
    exact = x.astype(np.float64)
    centred = exact - exact.mean(1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + epsilon)
    np.testing.assert_allclose(out, expected * weight + bias, rtol=0, atol=1e-4 if offset else 1e-5)


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
    np.testing.assert_allclose(residual[:, 32:], (x + values[:, :72] + bias[:72])[:, 32:], rtol=1e-5)


# -- attention -------------------------------------------------------------------------

HEADS, POSITIONS, ROWS = 3, 40, 3


@cache
def made_attend(usual: int) -> Callable[..., None]:
    from edge_slm_runtime.kernels.attention import make_attend

    return make_attend(usual)


@pytest.mark.parametrize("size", [64, 8, 20, 128])
@pytest.mark.parametrize(
    ("new", "keep", "starts"), [(1, 1, (0, 39)), (5, 5, (0, 7)), (9, 2, (31, 3)), (40, 1, (0, 0))]
)
def test_attention(size: int, new: int, keep: int, starts: tuple[int, int]) -> None:
    """New keys and values go to their places in half precision; every query sees those up to
    its own, and none behind."""
    rng, width, layer = np.random.default_rng(size), HEADS * size, 1
    stride = -(-3 * width // UNIT) * UNIT
    wide = floats(rng, 2, new, stride)
    kept = rng.normal(size=(4, ROWS, HEADS, POSITIONS, size)).astype(np.float16)
    for answer, start in enumerate(starts):
        kept[:, answer, :, start:] = np.nan
    out = np.full((2, keep, width), GUARD, np.float32)
    scores = np.full((2, POSITIONS), GUARD, np.float32)  # of two threads
    places = np.array(starts, np.int64)
    table, job, model = (np.zeros(n, np.int64) for n in (t.TABLE, t.PASS, t.FIRST_LAYER))
    table[t.WIDE], table[t.ATTENDED] = wide.ctypes.data, out.ctypes.data
    table[t.SCORES] = scores.ctypes.data
    job[t.ANSWERS], job[t.NEW], job[t.KEPT], job[t.CACHE_ROWS] = 2, new, keep, ROWS
    job[t.STARTS], job[t.CACHE] = places.ctypes.data, kept.ctypes.data
    model[t.HEADS], model[t.HEAD_SIZE], model[t.WIDTH] = HEADS, size, width
    model[t.POSITIONS] = POSITIONS
    before = kept.copy()
    attend = made_attend(64 if size == 64 else 0)
    for answer in range(2):
        for head in range(HEADS):
            attend(table, job, model, layer, answer, head, stride, keep, 1)
    q, k, v = (
        wide[..., i * width : (i + 1) * width].reshape(2, new, HEADS, size) for i in range(3)
    )
    for answer, start in enumerate(starts):
        before[2, answer, :, start : start + new] = k[answer].swapaxes(0, 1)
        before[3, answer, :, start : start + new] = v[answer].swapaxes(0, 1)
        for i in range(keep):
            position = new - keep + i
            keys, values = before[2:, answer, :, : start + position + 1].astype(np.float64)
            weights = np.einsum("hd,hjd->hj", q[answer, position], keys)
            weights = np.exp(weights - weights.max(1, keepdims=True))
            expected = np.einsum("hj,hjd->hd", weights, values) / weights.sum(1, keepdims=True)
            np.testing.assert_allclose(out[answer, i], expected.ravel(), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(kept, before)
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
