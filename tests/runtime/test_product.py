"""Products, and activations in 8 bits, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_slm_runtime.kernels import layout as t
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
        scale = floats(rng, blocks, padded).astype(np.float16)
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
            factor = a[:, block, None] * self.scale[block].astype(np.float32)
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
