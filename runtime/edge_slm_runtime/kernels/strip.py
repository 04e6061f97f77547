"""Activations to 8 bits, 32 at a time; the compiler's own vectoriser makes slow code of this."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from edge_slm_runtime.kernels.native import typed_intrinsic
from edge_slm_runtime.panels import STRIP

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, STRIP), ir.VectorType(_I32, STRIP)
_BYTES = ir.VectorType(_I8, STRIP)
_MAGNITUDE = 0x7FFFFFFF  # a float without its sign, which orders like an integer


def _peak(b: Any, address: Any) -> Any:
    bits = b.load(b.inttoptr(address, _INTS.as_pointer()), align=4)
    magnitudes = b.and_(bits, ir.Constant(_INTS, [_MAGNITUDE] * STRIP))
    return b.call(_call(b, f"llvm.vector.reduce.smax.v{STRIP}i32", _I32, _INTS), [magnitudes])


def _rounded(b: Any, address: Any, out: Any, factor: Any) -> Any:
    values = b.load(b.inttoptr(address, _FLOATS.as_pointer()), align=4)
    one = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), factor, _I32(0))
    every = b.shuffle_vector(one, one, ir.Constant(_INTS, [0] * STRIP))
    rounded = b.call(_call(b, f"llvm.rint.v{STRIP}f32", _FLOATS, _FLOATS), [b.fmul(values, every)])
    levels = b.fptosi(rounded, _INTS)
    b.store(b.trunc(levels, _BYTES), b.inttoptr(out, _BYTES.as_pointer()), align=1)
    return b.call(_call(b, f"llvm.vector.reduce.add.v{STRIP}i32", _I32, _INTS), [levels])


def _call(b: Any, name: str, result: Any, argument: Any) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, [argument]), name)


# (address) → the largest magnitude of 32 floats there, as the bits of a float
peak = typed_intrinsic(types.int32, [types.int64], _peak)
# (address, out, factor) → the sum of 32 floats times a factor, rounded; they go to `out`
rounded = typed_intrinsic(types.int32, [types.int64, types.int64, types.float32], _rounded)
