"""What numba lacks: memory by its address, half precision, atomic numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOAT, HALF = ir.FloatType(), ir.HalfType()

# Sums may be taken in another order than written, so that they become vectors. The order is
# fixed when the code is compiled, and depends on nothing but the number of terms.
FAST = {
    **{"nogil": True, "error_model": "numpy", "debug": False},
    "fastmath": {"reassoc", "contract", "nnan", "nsz"},
}
F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """A function of the kernels; its annotations are for the reader, numba infers the types."""
    compiled: F = njit(**FAST)(function)
    return compiled


def inlined(function: F) -> F:
    """Likewise, but of large functions that few others call: numba makes them a part of these.
    Else it would compile all that they call once for them and once again for their callers."""
    compiled: F = njit(inline="always", **FAST)(function)
    return compiled


def native(function: Callable[..., Any]) -> Any:
    """One that says itself which LLVM code it is (numba's `intrinsic`)."""
    return intrinsic(function)


def _view(kind: Any) -> Callable[[int, int], Any]:
    """(address, count) → an array of `kind` there."""
    pointer = types.CPointer(kind)

    @native
    def cast(context: Any, address: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            return b.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    @jit
    def view(address: int, count: int) -> Any:
        return carray(cast(address), count)

    return view


floats, ints, words = _view(types.float32), _view(types.int32), _view(types.int64)
signed, unsigned, halves = _view(types.int8), _view(types.uint8), _view(types.uint16)


def typed_intrinsic(result: Any, parameters: Sequence[Any], emit: Callable[..., Any]) -> Any:
    """A function of fixed types, none to three; emit(builder, *values) gives its LLVM code."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return emit(b, *arguments)

    signature = result(*parameters)

    def none(context: Any) -> Any:
        return signature, generate

    def one(context: Any, x: Any) -> Any:
        return signature, generate

    def two(context: Any, x: Any, y: Any) -> Any:
        return signature, generate

    def three(context: Any, x: Any, y: Any, z: Any) -> Any:
        return signature, generate

    return native((none, one, two, three)[len(parameters)])


def _word(b: Any, address: Any) -> Any:
    return b.inttoptr(address, I64.as_pointer())


def _spin_pause(b: Any, spins: Any) -> Any:
    """Tells the processor that this is a waiting loop; returns one spin more."""
    kind = ir.FunctionType(ir.VoidType(), [])
    b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])
    return b.add(spins, I64(1))


def fetch(b: Any, address: Any) -> Any:
    """Code that brings a line of memory nearer; it need not be there."""
    parts = [ir.IntType(8).as_pointer(), I32, I32, I32]
    kind = ir.FunctionType(ir.VoidType(), parts)
    call = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(call, [b.inttoptr(address, parts[0]), I32(0), I32(2), I32(1)])  # a read, into L2
    return address


def _store_zero(kind: Any) -> Callable[..., Any]:
    """An atomic store of 0, since of others the compiler makes a call of memset."""

    def emit(b: Any, address: Any) -> Any:
        place = b.inttoptr(address, kind.as_pointer())
        b.store_atomic(kind(0), place, "monotonic", kind.width // 8)
        return address

    return emit


def _call(b: Any, address: Any) -> Any:
    return b.call(b.inttoptr(address, ir.FunctionType(I32, []).as_pointer()), [])


to_float = typed_intrinsic(
    types.float32, [types.uint16], lambda b, x: b.fpext(b.bitcast(x, HALF), FLOAT)
)
to_half = typed_intrinsic(
    types.uint16, [types.float32], lambda b, x: b.bitcast(b.fptrunc(x, HALF), I16)
)
float_of_bits = typed_intrinsic(types.float32, [types.int32], lambda b, x: b.bitcast(x, FLOAT))
atomic_load = typed_intrinsic(
    types.int64, [types.int64], lambda b, p: b.load_atomic(_word(b, p), "seq_cst", 8)
)
atomic_add = typed_intrinsic(
    types.int64,
    [types.int64, types.int64],
    lambda b, p, x: b.atomic_rmw("add", _word(b, p), x, "seq_cst"),
)
atomic_swap = typed_intrinsic(
    types.int64,
    [types.int64, types.int64],
    lambda b, p, x: b.atomic_rmw("xchg", _word(b, p), x, "seq_cst"),
)
store_zero = typed_intrinsic(
    types.int64, [types.int64], _store_zero(ir.IntType(8))
)  # a byte becomes 0
store_zero_word = typed_intrinsic(types.int64, [types.int64], _store_zero(I64))
prefetch = typed_intrinsic(types.int64, [types.int64], fetch)
spin_pause = typed_intrinsic(types.int64, [types.int64], _spin_pause)
call = typed_intrinsic(types.int32, [types.int64], _call)  # of a C function without parameters


_LOG2_E, _HALF = np.float32(1.44269504), np.float32(0.5)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST, _MOST = np.float32(-87), np.float32(88)
_E0, _E2, _E3 = np.float32(1), np.float32(1 / 2), np.float32(1 / 6)
_E4, _E5, _E6 = np.float32(1 / 24), np.float32(1 / 120), np.float32(1 / 720)


@jit
def exp(x: float) -> Any:
    """e^x of a float32, x held between -87 and 88: 2^n · e^r with |r| ≤ ln 2 / 2, and e^r by
    its series. Without a branch, so that loops of it become vectors."""
    x = min(max(x, _LEAST), _MOST)
    n = np.floor(x * _LOG2_E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    series = _E0 + r * (_E0 + r * (_E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * _E6)))))
    return series * float_of_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))
