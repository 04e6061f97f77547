"""Normalisation, the residual, activation functions: all but products and attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edge_slm_runtime.kernels.native import exp, floats, jit
from edge_slm_runtime.panels import LANES

_ZERO, _HALF, _ONE, _TWO = (np.float32(x) for x in (0, 0.5, 1, 2))
_GELU_CUBE, _GELU_SCALE = np.float32(0.044715), np.float32(2 * math.sqrt(2 / math.pi))
_SQRT_HALF = np.float32(math.sqrt(0.5))
_FLOAT = 4  # bytes


_ERF = tuple(
    np.float32(x) for x in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)
_ERF_SCALE = np.float32(0.3275911)


@jit
def erf(x: float) -> Any:
    """The error function (Abramowitz and Stegun 1964, 7.1.26; error < 5e-7 in float32)."""
    t = _ONE / (_ONE + _ERF_SCALE * abs(x))
    series = t * (_ERF[0] + t * (_ERF[1] + t * (_ERF[2] + t * (_ERF[3] + t * _ERF[4]))))
    return np.copysign(_ONE - series * exp(-x * x), x)


@jit
def normalise(
    source: int, row: int, width: int, weight: int, bias: int, epsilon: float, target: int
) -> None:
    """LayerNorm (Ba et al. 2016) of a row."""
    x = floats(source + row * width * _FLOAT, width)
    y = floats(target + row * width * _FLOAT, width)
    w, b = floats(weight, width), floats(bias, width)
    total = _ZERO
    for i in range(width):
        total += x[i]
    mean = total / np.float32(width)
    total = _ZERO
    for i in range(width):
        total += (x[i] - mean) * (x[i] - mean)
    factor = _ONE / np.sqrt(total / np.float32(width) + epsilon)
    for i in range(width):
        y[i] = (x[i] - mean) * factor * w[i] + b[i]


@jit
def rms_normalise(
    source: int, row: int, width: int, weight: int, epsilon: float, target: int
) -> None:
    """Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467) of a row."""
    x = floats(source + row * width * _FLOAT, width)
    y = floats(target + row * width * _FLOAT, width)
    w = floats(weight, width)
    total = _ZERO
    for i in range(width):
        total += x[i] * x[i]
    factor = _ONE / np.sqrt(total / np.float32(width) + epsilon)
    for i in range(width):
        y[i] = x[i] * factor * w[i]


@jit
def add_bias(values: int, n: int, stride: int, bias: int, first: int, last: int) -> None:
    """To the panels first … last of n rows."""
    b = floats(bias, stride)
    for row in range(n):
        x = floats(values + row * stride * _FLOAT, stride)
        for i in range(first * LANES, last * LANES):
            x[i] += b[i]


@jit
def add_to(
    target: int, n: int, width: int, values: int, stride: int, bias: int, first: int, last: int
) -> None:
    """The residual plus the output of a layer, of these panels."""
    b = floats(bias, stride)
    for row in range(n):
        x = floats(target + row * width * _FLOAT, width)
        y = floats(values + row * stride * _FLOAT, stride)
        for i in range(first * LANES, min(last * LANES, width)):
            x[i] += y[i] + b[i]


@jit
def activate(values: int, n: int, stride: int, bias: int, first: int, last: int, kind: int) -> None:
    """The activation of x + bias, of these panels; kind: an index of `decoder.ACTIVATIONS`."""
    count = (last - first) * LANES
    b = floats(bias + first * LANES * _FLOAT, count)
    for row in range(n):
        _apply(floats(values + (row * stride + first * LANES) * _FLOAT, count), b, count, kind)


@jit
def gate(
    values: int, n: int, stride: int, bias: int, first: int, last: int, kind: int, out: int
) -> None:
    """The activation of x + bias, times y + bias (Shazeer, arXiv 2002.05202), of these panels:
    the panels of x, the gate, and of y alternate. out: float32 [n, stride / 2]."""
    for panel in range(first, last, 2):
        start = panel * LANES
        b, c = floats(bias + start * _FLOAT, LANES), floats(bias + (start + LANES) * _FLOAT, LANES)
        for row in range(n):
            place = values + (row * stride + start) * _FLOAT
            x, y = floats(place, LANES), floats(place + LANES * _FLOAT, LANES)
            z = floats(out + (row * stride + start) // 2 * _FLOAT, LANES)
            _apply(x, b, LANES, kind)
            for i in range(LANES):
                z[i] = x[i] * (y[i] + c[i])


@jit
def _apply(x: Any, b: Any, count: int, kind: int) -> None:
    """x = activation(x + b)"""
    if kind == 0:
        for i in range(count):
            y = x[i] + b[i]
            x[i] = y / (_ONE + exp(-_GELU_SCALE * (y + _GELU_CUBE * y * y * y)))
    elif kind == 1:
        for i in range(count):
            y = x[i] + b[i]
            x[i] = _HALF * y * (_ONE + erf(y * _SQRT_HALF))
    elif kind == 2:
        for i in range(count):
            x[i] = max(x[i] + b[i], _ZERO)
    elif kind == 3:
        for i in range(count):
            y = x[i] + b[i]
            x[i] = y / (_ONE + exp(-y))
    else:
        for i in range(count):
            x[i] = _TWO / (_ONE + exp(-_TWO * (x[i] + b[i]))) - _ONE
