"""Activations in 8 bits, and their product with a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.native import (
    float_of_bits,
    floats,
    halves,
    ints,
    jit,
    signed,
    store_zero,
    to_float,
    unsigned,
)
from edge_slm_runtime.kernels.strip import peak, rounded
from edge_slm_runtime.kernels.tile import make_tile
from edge_slm_runtime.panels import LANES, PAIR, STRIP

_TOP = np.float32(127)
_LEAST = np.float32(1e-34)  # a 127th of it is still a normal number
_FLOAT, _HALF = 4, 2  # bytes


@jit
def quantise(
    source: int, row: int, stride: int, width: int, matrix: Any, first: int, last: int,
    levels: int, steps: int, sums: int,
) -> None:  # fmt: skip
    """Blocks first … last of a row of floats, for `matrix`: in steps of a 127th of a block's
    largest value, rounded to nearest; and the sum of a block's levels."""
    blocks, size = matrix[t.BLOCKS], matrix[t.SIZE]
    source += row * stride * _FLOAT
    levels += row * blocks * size
    x, q = floats(source, width), signed(levels, blocks * size)
    a, c = floats(steps + row * blocks * _FLOAT, blocks), ints(sums + row * blocks * 4, blocks)
    for block in range(first, last):
        start = block * size
        end = min(start + size, width)
        strips = start + (end - start) // STRIP * STRIP
        bits = np.int32(0)
        for i in range(start, strips, STRIP):
            bits = max(bits, peak(source + i * _FLOAT))
        largest = float_of_bits(np.int32(bits))
        for i in range(strips, end):
            largest = max(largest, abs(x[i]))
        largest = max(largest, _LEAST)
        factor = _TOP / largest
        total = np.int32(0)
        for i in range(start, strips, STRIP):
            total += rounded(source + i * _FLOAT, levels + i, factor)
        for i in range(strips, end):
            level = np.int32(np.rint(x[i] * factor))
            q[i] = level
            total += level
        for i in range(end, start + size):
            store_zero(levels + i)
        a[block], c[block] = largest / _TOP, total


def make_product(vnni: bool) -> Callable[..., None]:
    """product(matrix, levels, steps, sums, n, out, stride, first, last): n rows of activations
    times the panels first … last of a matrix, to out float32 [n, stride]."""

    def make_rows(bits: int) -> Callable[..., Any]:
        alone, two, four, eight = (
            make_tile(rows, PAIR if rows > 1 else 1, bits, vnni) for rows in (1, 2, 4, 8)
        )

        @jit
        def rows(
            left: int, w: int, s: int, z: int, q: int, a: int, c: int, blocks: int, size: int,
            out: int, stride: int, ahead: int,
        ) -> int:  # fmt: skip
            """A pair of panels and as many rows as a tile takes; returns how many these are."""
            if left >= 8:
                eight(w, s, z, q, a, c, blocks, size, out, stride, ahead)
                return 8
            if left >= 4:
                four(w, s, z, q, a, c, blocks, size, out, stride, ahead)
                return 4
            if left >= 2:
                two(w, s, z, q, a, c, blocks, size, out, stride, ahead)
                return 2
            line = blocks * LANES
            for _ in range(PAIR):
                alone(w, s, z, q, a, c, blocks, size, out, stride, ahead)
                w += line * size * bits // 8
                s += line * _HALF
                z += line
                out += LANES * _FLOAT
            return 1

        return rows

    rows_4, rows_8 = make_rows(4), make_rows(8)

    @jit
    def product(
        matrix: Any, levels: int, steps: int, sums: int, n: int, out: int, stride: int,
        first: int, last: int,
    ) -> None:  # fmt: skip
        blocks, size, bits = matrix[t.BLOCKS], matrix[t.SIZE], matrix[t.BITS]
        for panel in range(first, last, PAIR):
            line = panel * blocks * LANES
            w, s = matrix[t.LEVEL] + line * size * bits // 8, matrix[t.SCALE] + line * _HALF
            z = matrix[t.ZERO] + line
            row = 0
            while row < n:
                q, a = levels + row * blocks * size, steps + row * blocks * _FLOAT
                c, o = sums + row * blocks * 4, out + (row * stride + panel * LANES) * _FLOAT
                if bits == 4:
                    row += rows_4(n - row, w, s, z, q, a, c, blocks, size, o, stride, row == 0)
                else:
                    row += rows_8(n - row, w, s, z, q, a, c, blocks, size, o, stride, row == 0)

    return product


@jit
def unpack(matrix: Any, output: int, out: Any) -> None:
    """Weights [K] of one output of an 8-bit matrix: a row of the embedding."""
    panel, lane = output // LANES, output % LANES
    blocks, size = matrix[t.BLOCKS], matrix[t.SIZE]
    levels = unsigned(matrix[t.LEVEL] + panel * blocks * size * LANES, blocks * size * LANES)
    scales = halves(matrix[t.SCALE] + panel * blocks * LANES * _HALF, blocks * LANES)
    for i in range(len(out)):
        level = levels[i // 4 * 4 * LANES + lane * 4 + i % 4]
        scale = to_float(scales[i // size * LANES + lane])
        out[i] = np.float32(np.int32(level) - 128) * scale
