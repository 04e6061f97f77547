"""The sums of attention and of adapters, written as LLVM vector code.

Products of queries and keys have a key in each lane of a vector: the keys of 16 positions lie
together, dimension by dimension. Sums of values have a dimension in each lane. Nothing is
summed across lanes, and terms are added in their order, so that a query gets the same bits
alone and in a tile of several, whatever the size of the tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from edge_slm_runtime.kernels.native import native
from edge_slm_runtime.panels import LANES

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_F32, LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)
_FLOAT, _HALF = 4, 2  # bytes
_WAYS = 4


def make_dot(queries: int, blocks: int) -> Callable[..., None]:
    """dot(q, keys, size, out, q_stride, out_stride): products of `queries` rows q float32 [.,
    size] and the keys of 16 · `blocks` positions, float16 [blocks, size, 16]; out float32
    [queries, 16 · blocks]. All are addresses or counts, strides in floats."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        q, keys, size, out, q_stride, out_stride = arguments
        totals = _totals(b, queries, blocks)
        with cgutils.for_range(b, size) as loop:
            d = loop.index
            loaded = [
                _halves(b, keys, b.add(b.mul(size, _I64(block)), d)) for block in range(blocks)
            ]
            for row in range(queries):
                x = _splat(b, q, b.add(b.mul(q_stride, _I64(row)), d))
                for block in range(blocks):
                    _add(b, totals[row][block], x, loaded[block])
        for row in range(queries):
            for block in range(blocks):
                place = b.add(b.mul(out_stride, _I64(row)), _I64(LANES * block))
                b.store(b.load(totals[row][block]), _floats(b, out, place), align=_FLOAT)
        return context.get_dummy_value()

    return _of_six(generate)


def make_mix(queries: int, chunks: int, more: bool = False) -> Callable[..., None]:
    """mix(weights, values, count, size, out, weight_stride, out_stride): out float32 [queries,
    16 · chunks] is the sum of the first `count` values, float16 [count, size], of which these
    are columns, weighted by `weights` float32 [queries, count]; more: it is added to `out`.
    Strides in floats."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        weights, values, count, size, out, weight_stride, out_stride = arguments

        def place(row: int, chunk: int) -> Any:
            return _floats(b, out, b.add(b.mul(out_stride, _I64(row)), _I64(LANES * chunk)))

        totals = _totals(b, queries, chunks)
        for row in range(queries if more else 0):
            for chunk in range(chunks):
                b.store(b.load(place(row, chunk), align=_FLOAT), totals[row][chunk])
        with cgutils.for_range(b, count) as loop:
            j = loop.index
            line = b.add(values, b.mul(b.mul(j, size), _I64(_HALF)))
            loaded = [_halves(b, line, _I64(chunk)) for chunk in range(chunks)]
            for row in range(queries):
                x = _splat(b, weights, b.add(b.mul(weight_stride, _I64(row)), j))
                for chunk in range(chunks):
                    _add(b, totals[row][chunk], x, loaded[chunk])
        for row in range(queries):
            for chunk in range(chunks):
                b.store(b.load(totals[row][chunk]), place(row, chunk), align=_FLOAT)
        return context.get_dummy_value()

    return _of_seven(generate)


def make_fold(more: bool) -> Callable[..., None]:
    """fold(weights, values, count, out): out float32 [16] is the sum of `count` values, float16
    [count, 16], weighted by `weights` float32 [count]; more: it is added to `out`.

    Terms go in turn to one of four sums, which are added in the end: a lone sum would wait for
    each of its additions.
    """

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        weights, values, count, out = arguments
        (totals,) = _totals(b, 1, _WAYS)
        place = _floats(b, out, _I64(0))
        if more:
            b.store(b.load(place, align=_FLOAT), totals[0])
        whole = b.and_(count, _I64(-_WAYS))
        with cgutils.for_range(b, b.udiv(count, _I64(_WAYS))) as loop:
            first = b.mul(loop.index, _I64(_WAYS))
            for way, total in enumerate(totals):
                j = b.add(first, _I64(way))
                _add(b, total, _splat(b, weights, j), _halves(b, values, j))
        with cgutils.for_range(b, b.sub(count, whole)) as loop:
            j = b.add(whole, loop.index)
            _add(b, totals[0], _splat(b, weights, j), _halves(b, values, j))
        one, two, three, four = map(b.load, totals)
        b.store(b.fadd(b.fadd(one, two), b.fadd(three, four)), place, align=_FLOAT)
        return context.get_dummy_value()

    return _of_four(generate)


def _of_four(generate: Callable[..., Any]) -> Callable[..., None]:
    @native
    def function(context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return types.void(*[types.int64] * 4), generate

    made: Callable[..., None] = function
    return made


def _of_six(generate: Callable[..., Any]) -> Callable[..., None]:
    @native
    def function(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        return types.void(*[types.int64] * 6), generate

    made: Callable[..., None] = function
    return made


def _of_seven(generate: Callable[..., Any]) -> Callable[..., None]:
    @native
    def function(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
        return types.void(*[types.int64] * 7), generate

    made: Callable[..., None] = function
    return made


def _totals(b: Any, rows: int, columns: int) -> list[list[Any]]:
    """Variables that become registers, 0 at first."""
    zeros = ir.Constant(_FLOATS, [0.0] * LANES)
    return [[cgutils.alloca_once_value(b, zeros) for _ in range(columns)] for _ in range(rows)]


def _add(b: Any, total: Any, x: Any, y: Any) -> None:
    """total += x · y"""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    fma = cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32")
    b.store(b.call(fma, [x, y, b.load(total)]), total)


def _halves(b: Any, base: Any, index: Any) -> Any:
    """The index-th 16 halves after `base`, as floats."""
    address = b.add(base, b.mul(index, _I64(LANES * _HALF)))
    loaded = b.load(b.inttoptr(address, _HALVES.as_pointer()), align=_HALF)
    return b.fpext(loaded, _FLOATS)


def _floats(b: Any, base: Any, index: Any) -> Any:
    """A pointer to 16 floats, the first of them the index-th after `base`."""
    return b.inttoptr(b.add(base, b.mul(index, _I64(_FLOAT))), _FLOATS.as_pointer())


def _splat(b: Any, base: Any, index: Any) -> Any:
    """The index-th float after `base`, in every lane."""
    address = b.add(base, b.mul(index, _I64(_FLOAT)))
    value = b.load(b.inttoptr(address, _F32.as_pointer()), align=_FLOAT)
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    one = b.insert_element(undefined, value, _I32(0))
    lanes = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return b.shuffle_vector(one, undefined, lanes)
