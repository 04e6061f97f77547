"""Adapters: x·a·b beside the product of x and a matrix (Hu et al., arXiv 2106.09685).

In float32 of rows as they are before they are rounded, each row by itself and with its own
adapter or none, so that a row gets the same bits alone and among others.
"""

from __future__ import annotations

from typing import Any

from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.heads import make_fold
from edge_slm_runtime.kernels.native import jit, words
from edge_slm_runtime.kernels.schedule import WORD
from edge_slm_runtime.panels import LANES

_FLOAT, _HALF = 4, 2  # bytes
_fold, _fold_more = make_fold(more=False), make_fold(more=True)


@jit
def kept(changes: int, job: Any) -> int:
    """The adapters of the rows that logits are wanted of, by those of all rows."""
    return changes + WORD * job[t.TOKENS] if changes else 0


@jit
def shrink(table: Any, changes: int, row: int, number: int, source: int) -> None:
    """A row of floats times the first factor of its adapter, to LOW. number: of the matrix among
    those of all layers."""
    address = words(changes, row + 1)[row]
    if address:
        change = words(address + WORD * t.CHANGE * number, t.CHANGE)
        inputs, factor = change[t.INPUTS], change[t.FIRST_FACTOR]
        low = table[t.LOW] + row * words(table[t.JOB], t.PASS)[t.RANKS] * _FLOAT
        for first in range(0, change[t.RANK], LANES):
            _fold(source, factor + first * inputs * _HALF, inputs, low + first * _FLOAT)


@jit
def expand(
    table: Any, changes: int, n: int, number: int, out: int, stride: int, first: int, last: int
) -> None:
    """Adds LOW times the second factors to the panels first … last of n rows."""
    for row in range(n):
        address = words(changes, n)[row]
        if address:
            change = words(address + WORD * t.CHANGE * number, t.CHANGE)
            rank, factor = change[t.RANK], change[t.SECOND_FACTOR]
            low = table[t.LOW] + row * words(table[t.JOB], t.PASS)[t.RANKS] * _FLOAT
            for panel in range(first, last if rank else first):
                place = out + (row * stride + panel * LANES) * _FLOAT
                _fold_more(low, factor + panel * rank * LANES * _HALF, rank, place)
