"""The product that everything waits for, written as LLVM vector code.

A tile is some rows of 8-bit activations times a panel of 16 outputs. A lane of a vector is
an output, so nothing is ever summed across lanes, and four inputs are multiplied and added
at a time (`vpdpbusd` where the processor has it):

    out[row, n] = Σ over blocks  scale[block, n] · a[row, block] · Σ (level − zero) · q

with q the activations in whole steps of a. The inner sum is exact and the outer one goes
through the blocks in their order, so results are batch-invariant: a row gets the same bits alone
and among others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from edge_slm_runtime.kernels.native import fetch, native
from edge_slm_runtime.panels import LANES, STRIP

I8, I32, I64, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES = ir.VectorType(I8, 4 * LANES)
INTS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(F32, LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)
_BYTE_ZERO = 128  # of 8-bit levels
_LINE = 4 * LANES  # bytes of a vector

Tile = Callable[..., None]


def make_tile(rows: int, panels: int, bits: int, vnni: bool) -> Tile:
    """tile(levels, scales, zeros, q, a, sums, blocks, size, out, stride, ahead)

    All but the last are counts or addresses: levels, scales (float16) and zeros (bytes, of
    4-bit levels) of the first panel as `panels` lays them out; q int8 [rows, blocks · size],
    a float32 and sums int32 (of q) [rows, blocks]; out float32 [rows, stride], of which
    16 · panels columns are written. ahead: not 0 when the panels after these come next, and
    computing takes so long that the processor would not look for them by itself.
    """

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        _Tile(b, rows, panels, bits, vnni, arguments).build()
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
        ahead: Any,
    ) -> Any:
        return types.void(*[types.int64] * 11), generate

    made: Tile = tile
    return made


class _Tile:
    """Writes the code of one; the variables that it keeps become registers."""

    def __init__(
        self, b: Any, rows: int, panels: int, bits: int, vnni: bool, arguments: Any
    ) -> None:
        self.b, self.bits, self.vnni = b, bits, vnni
        self.rows, self.panels = range(rows), range(panels)
        self.levels, self.scales, self.zeros, self.q, self.a, self.sums = arguments[:6]
        self.blocks, self.size, self.out, self.stride, self.ahead = arguments[6:]
        self.strips = b.udiv(self.size, I64(STRIP))
        self.strip_bytes = STRIP * LANES * bits // 8
        zeros = ir.Constant(FLOATS, [0.0] * LANES)
        self.totals: list[list[Any]] = []
        self.counts: list[list[Any]] = []
        for _ in self.rows:
            self.totals.append([cgutils.alloca_once_value(b, zeros) for _ in self.panels])
            self.counts.append([cgutils.alloca_once(b, INTS) for _ in self.panels])

    def build(self) -> None:
        b = self.b
        with cgutils.for_range(b, self.blocks) as blocks:
            self.start(blocks.index)
            with cgutils.for_range(b, self.strips) as strips:
                self.count(b.add(b.mul(blocks.index, self.strips), strips.index))
            self.scale(blocks.index)
        for m in self.rows:
            for p in self.panels:
                place = b.add(b.mul(self.stride, I64(m)), I64(LANES * p))
                b.store(b.load(self.totals[m][p]), self.at(self.out, FLOATS, place, 4), align=4)

    def start(self, block: Any) -> None:
        """counts = - zero · Σ q"""
        b = self.b
        for m in self.rows:
            total = b.load(self.at(self.sums, I32, self.of(m, block), 4))
            for p in self.panels:
                if self.bits == 8:
                    count = _splat(b, b.mul(total, I32(-_BYTE_ZERO)))
                else:
                    kind = ir.VectorType(I8, LANES)
                    zero = b.load(self.at(self.zeros, kind, self.of(p, block), LANES), align=1)
                    count = b.mul(b.zext(zero, INTS), _splat(b, b.neg(total)))
                b.store(count, self.counts[m][p])

    def count(self, strip: Any) -> None:
        """counts += Σ level · q, over a strip"""
        b, panel_bytes = self.b, _product(self.b, self.blocks, self.strips, I64(self.strip_bytes))
        offset = b.mul(strip, I64(self.strip_bytes))
        sources = [_sum(b, self.levels, b.mul(panel_bytes, I64(p)), offset) for p in self.panels]
        words = [_strip(b, source, self.bits) for source in sources]
        if len(self.rows) > 1:
            with b.if_then(b.icmp_signed("!=", self.ahead, I64(0))):
                far = b.mul(panel_bytes, I64(len(self.panels)))
                for source in sources:
                    for line in range(0, self.strip_bytes, _LINE):
                        fetch(b, _sum(b, source, far, I64(line)))
        for four in range(STRIP // 4):
            for m in self.rows:
                row = _product(b, self.blocks, self.size, I64(m))
                place = _sum(b, row, b.mul(strip, I64(STRIP)), I64(4 * four))
                x = _splat(b, b.load(self.at(self.q, I32, place, 1), align=4))
                for p in self.panels:
                    count = b.load(self.counts[m][p])
                    b.store(_dot(b, count, words[p][four], x, self.vnni), self.counts[m][p])

    def scale(self, block: Any) -> None:
        """totals += scale · a · counts"""
        b = self.b
        size = 2 * LANES  # bytes
        scales = [
            b.fpext(
                b.load(self.at(self.scales, HALVES, self.of(p, block), size), align=size), FLOATS
            )
            for p in self.panels
        ]
        for m in self.rows:
            step = _splat(b, b.load(self.at(self.a, F32, self.of(m, block), 4)))
            for p in self.panels:
                value = b.sitofp(b.load(self.counts[m][p]), FLOATS)
                total = b.load(self.totals[m][p])
                total = _fma(b, value, b.fmul(step, scales[p]), total)
                b.store(total, self.totals[m][p])

    def of(self, number: int, block: Any) -> Any:
        """The index of a block of a row or a panel."""
        return self.b.add(self.b.mul(self.blocks, I64(number)), block)

    def at(self, base: Any, kind: Any, index: Any, size: int) -> Any:
        """A pointer to the index-th `kind`, `size` bytes apart, after `base`."""
        b = self.b
        return b.inttoptr(b.add(base, b.mul(index, I64(size))), kind.as_pointer())


def _strip(b: Any, source: Any, bits: int) -> list[Any]:
    """Levels of a strip: by four inputs, those of 16 outputs."""
    loaded = [
        b.load(b.inttoptr(b.add(source, I64(_LINE * i)), BYTES.as_pointer()), align=_LINE)
        for i in range(STRIP // 4 * bits // 8)
    ]
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


def _sum(b: Any, *values: Any) -> Any:
    return reduce(b.add, values)


def _product(b: Any, *values: Any) -> Any:
    return reduce(b.mul, values)
