"""Causal self-attention of one head over its keys and values in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.native import (
    exp,
    floats,
    halves,
    jit,
    prefetch,
    to_float,
    to_half,
    words,
)

_ZERO, _ONE, _LEAST = np.float32(0), np.float32(1), np.float32(-np.inf)
_FLOAT, _HALF, _LINE = 4, 2, 64  # bytes


@jit
def halve(source: int, count: int, target: int) -> None:
    x, y = floats(source, count), halves(target, count)
    for i in range(count):
        y[i] = to_half(x[i])


def make_attend(usual: int) -> Callable[..., None]:
    """attend(table, answer, layer, head, stride, kept_only, thread): for heads of the `usual`
    size, whose loops the compiler then unrolls; 0 is for all."""
    score, mix = _make_score(usual), _make_mix(usual)

    @jit
    def attend(
        table: Any, answer: int, layer: int, head: int, stride: int, kept_only: bool, thread: int
    ) -> None:
        """Writes a head's new keys and values of a part of the pass, then attends from its
        new positions, or from those whose logits are wanted.

        The queries come scaled: the converter has put the factor into the weights.
        """
        job, model = words(table[t.JOB], t.PASS), words(table[t.MODEL], t.FIRST_LAYER)
        size, width, positions = model[t.HEAD_SIZE], model[t.WIDTH], model[t.POSITIONS]
        part = words(job[t.PARTS] + answer * t.PART * 8, t.PART)
        start, new = words(job[t.STARTS], job[t.ANSWERS])[answer], part[t.NEW]
        half = job[t.CACHE_ROWS] * width * positions * _HALF  # keys of all rows, or values
        keys = job[t.CACHE] + 2 * layer * half
        keys += (part[t.ROW] * width + head * size) * positions * _HALF
        values = keys + half
        qkv = table[t.PRODUCT] + (part[t.FIRST] * stride + head * size) * _FLOAT
        for i in range(new):
            place = (start + i) * size * _HALF
            halve(qkv + (i * stride + width) * _FLOAT, size, keys + place)
            halve(qkv + (i * stride + 2 * width) * _FLOAT, size, values + place)
        # The next head's, or the next answer's first: no processor foresees that.
        ahead = positions * size * _HALF if new == 1 else 0
        scores = floats(table[t.SCORES] + thread * positions * _FLOAT, positions)
        first, row = (new - part[t.KEPT], part[t.FIRST_KEPT]) if kept_only else (0, part[t.FIRST])
        for i in range(first, new):
            count = start + i + 1
            q = floats(qkv + i * stride * _FLOAT, size)
            out = floats(table[t.ATTENDED] + (row * width + head * size) * _FLOAT, size)
            largest = score(q, keys, count, size, ahead, scores)
            norm = _ZERO
            for j in range(count):
                scores[j] = exp(scores[j] - largest)
                norm += scores[j]
            mix(scores, values, count, size, ahead, out)
            for d in range(size):
                out[d] *= _ONE / norm
            row += 1

    return attend


def _make_score(usual: int) -> Callable[..., Any]:
    @jit
    def score(q: Any, keys: int, count: int, any_size: int, ahead: int, scores: Any) -> Any:
        """Products of a query and its first `count` keys; returns the largest. What lies
        `ahead` bytes further will be needed next."""
        size = usual if usual else max(any_size, 1)  # no loop of it is empty
        largest = _LEAST
        for j in range(count):
            k = halves(keys + j * size * _HALF, size)
            if ahead:
                for line in range(0, size * _HALF, _LINE):
                    prefetch(keys + ahead + j * size * _HALF + line)
            total = _ZERO
            for d in range(size):
                total += q[d] * to_float(k[d])
            scores[j] = total
            largest = max(largest, total)
        return largest

    return score


def _make_mix(usual: int) -> Callable[..., None]:
    @jit
    def mix(weights: Any, values: int, count: int, any_size: int, ahead: int, out: Any) -> None:
        """The first `count` values, weighted."""
        size = usual if usual else any_size
        v = halves(values, size)
        for d in range(size):
            out[d] = weights[0] * to_float(v[d])
        fours = (count - 1) // 4 * 4 + 1
        for j in range(1, fours, 4):
            v = halves(values + j * size * _HALF, 4 * size)
            if ahead:
                for line in range(0, 4 * size * _HALF, _LINE):
                    prefetch(values + ahead + j * size * _HALF + line)
            a, b, c, e = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
            for d in range(size):
                out[d] += (a * to_float(v[d]) + b * to_float(v[size + d])) + (
                    c * to_float(v[2 * size + d]) + e * to_float(v[3 * size + d])
                )
        for j in range(fours, count):
            v = halves(values + j * size * _HALF, size)
            for d in range(size):
                out[d] += weights[j] * to_float(v[d])

    return mix
