"""The product that everything waits for, written as LLVM vector code.

A tile is some rows of 8-bit activations times a panel of 16 outputs. A lane of a vector is
an output, so nothing is ever summed across lanes, and four inputs are multiplied and added
at a time (`vpdpbusd` where the processor has it):

    out[row, n] = Σ over blocks  scale[block, n] · a[row, block] · Σ (level − zero) · q

with q the activations in whole steps of a. The inner sum is exact and the outer one goes
through the blocks in their order, so a row gets the same bits in whatever company.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from edge_slm_runtime.kernels.native import native
from edge_slm_runtime.panels import LANES, STRIP

I8, I32, I64, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES = ir.VectorType(I8, 4 * LANES)
INTS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(F32, LANES)
_BYTE_ZERO = 128  # of 8-bit levels
_LINE = 4 * LANES  # bytes of a vector

Tile = Callable[..., None]


def make_tile(rows: int, panels: int, bits: int, vnni: bool) -> Tile:
    """tile(levels, scales, zeros, q, a, sums, blocks, size, out, stride)

    All but the counts are addresses: levels, scales (float32) and zeros (bytes, of 4-bit
    levels) of the first panel as `panels.pack` lays them out; q int8 [rows, blocks · size],
    a float32 and sums int32 (of q) [rows, blocks]; out float32 [rows, stride], of which
    16 · panels columns are written.
    """

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        levels, scales, zeros, q, a, sums, blocks, size, out, stride = arguments
        at = _Addresses(b)
        strips = b.udiv(size, I64(STRIP))
        strip_bytes = STRIP * LANES * bits // 8
        inputs = b.mul(blocks, size)
        totals = _grid(rows, panels, lambda: cgutils.alloca_once_value(b, _zeros(FLOATS)))
        counts = _grid(rows, panels, lambda: cgutils.alloca_once(b, INTS))
        with cgutils.for_range(b, blocks) as loop:
            block = loop.index
            for m in range(rows):
                number = b.add(b.mul(blocks, I64(m)), block)
                total = b.load(at(sums, I32, number, 4))
                for p in range(panels):
                    if bits == 8:
                        start = _splat(b, b.mul(total, I32(-_BYTE_ZERO)))
                    else:
                        place = b.add(b.mul(blocks, I64(p)), block)
                        zero = b.load(at(zeros, ir.VectorType(I8, LANES), place, LANES), align=1)
                        start = b.mul(b.zext(zero, INTS), _splat(b, b.neg(total)))
                    b.store(start, counts[m][p])
            with cgutils.for_range(b, strips) as inner:
                strip = b.add(b.mul(block, strips), inner.index)
                sources = [
                    b.add(
                        levels,
                        b.mul(b.add(b.mul(b.mul(blocks, strips), I64(p)), strip), I64(strip_bytes)),
                    )
                    for p in range(panels)
                ]
                words = [_strip(b, at, source, bits) for source in sources]
                for four in range(STRIP // 4):
                    for m in range(rows):
                        offset = b.add(b.mul(inputs, I64(m)), b.mul(strip, I64(STRIP)))
                        x = b.load(at(q, I32, b.add(offset, I64(4 * four)), 1), align=4)
                        x = _splat(b, x)
                        for p in range(panels):
                            count = b.load(counts[m][p])
                            b.store(_dot(b, count, words[p][four], x, vnni), counts[m][p])
            scale = [
                b.load(at(scales, FLOATS, b.add(b.mul(blocks, I64(p)), block), _LINE), align=_LINE)
                for p in range(panels)
            ]
            for m in range(rows):
                step = b.load(at(a, F32, b.add(b.mul(blocks, I64(m)), block), 4))
                for p in range(panels):
                    factor = b.fmul(_splat(b, step), scale[p])
                    value = b.sitofp(b.load(counts[m][p]), FLOATS)
                    total = _fma(b, value, factor, b.load(totals[m][p]))
                    b.store(total, totals[m][p])
        for m in range(rows):
            for p in range(panels):
                place = b.add(b.mul(stride, I64(m)), I64(LANES * p))
                b.store(b.load(totals[m][p]), at(out, FLOATS, place, 4), align=4)
        return context.get_dummy_value()

    @native
    def tile(
        context: Any,
        levels: Any,
        scales: Any,
        zeros: Any,
        q: Any,
        a: Any,
        sums: Any,
        blocks: Any,
        size: Any,
        out: Any,
        stride: Any,
    ) -> Any:
        return types.void(*[types.int64] * 10), generate

    made: Tile = tile
    return made


def _strip(b: Any, at: _Addresses, source: Any, bits: int) -> list[Any]:
    """Levels of a strip: by four inputs, those of 16 outputs."""
    loads = range(STRIP // 4 * bits // 8)
    loaded = [b.load(at(source, BYTES, I64(i), _LINE), align=_LINE) for i in loads]
    if bits == 8:
        return loaded
    low = ir.Constant(BYTES, [15] * 4 * LANES)
    upper = [b.bitcast(b.lshr(b.bitcast(both, INTS), _ints(4)), BYTES) for both in loaded]
    halves = [part for pair in zip(loaded, upper, strict=True) for part in pair]
    return [b.and_(half, low) for half in halves]


def _dot(b: Any, total: Any, levels: Any, q: Any, vnni: bool) -> Any:
    """total + the sum of four products of a byte of `levels` and a signed one of `q`."""
    if vnni:
        kind = ir.FunctionType(INTS, [INTS, BYTES, BYTES])
        name = "llvm.x86.avx512.vpdpbusd.512"
        call = cgutils.get_or_insert_function(b.module, kind, name)
        return b.call(call, [total, levels, b.bitcast(q, BYTES)])
    levels = b.bitcast(levels, INTS)
    for byte in range(4):
        level = b.and_(b.lshr(levels, _ints(8 * byte)), _ints(255))
        step = b.ashr(b.shl(q, _ints(24 - 8 * byte)), _ints(24))
        total = b.add(total, b.mul(level, step))
    return total


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    call = cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32")
    return b.call(call, [x, y, z])


def _splat(b: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, LANES)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _ints(0))


def _ints(value: int) -> Any:
    return ir.Constant(INTS, [value] * LANES)


def _zeros(kind: Any) -> Any:
    return ir.Constant(kind, [0.0] * LANES)


def _grid(rows: int, columns: int, make: Callable[[], Any]) -> list[list[Any]]:
    return [[make() for _ in range(columns)] for _ in range(rows)]


class _Addresses:
    """at(base, kind, index, size): a pointer to the index-th `kind` behind `base`."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __call__(self, base: Any, kind: Any, index: Any, size: int) -> Any:
        b = self._builder
        return b.inttoptr(b.add(base, b.mul(index, I64(size))), kind.as_pointer())
