"""Causal self-attention of one head over its keys and values in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_slm_runtime.kernels import tables as t
from edge_slm_runtime.kernels.native import exp, floats, halves, jit, to_float, to_half, words

_ZERO, _ONE, _LEAST = np.float32(0), np.float32(1), np.float32(-np.inf)
_FLOAT, _HALF = 4, 2  # bytes


def make_attend(usual: int) -> Callable[..., None]:
    """attend(table, job, model, layer, answer, head, stride, keep, thread): for heads of the
    `usual` size, whose loops the compiler then unrolls; 0 is for all."""

    @jit
    def score(q: Any, keys: int, count: int, any_size: int, scores: Any) -> Any:
        """Products of a query and its first `count` keys; returns the largest."""
        size = usual if usual else any_size
        largest = _LEAST
        for j in range(count):
            k = halves(keys + j * size * _HALF, size)
            total = _ZERO
            for d in range(size):
                total += q[d] * to_float(k[d])
            scores[j] = total
            largest = max(largest, total)
        return largest

    @jit
    def mix(weights: Any, values: int, count: int, any_size: int, out: Any) -> None:
        """The first `count` values, weighted."""
        size = usual if usual else any_size
        for d in range(size):
            out[d] = _ZERO
        fours = count // 4 * 4
        for j in range(0, fours, 4):
            v = halves(values + j * size * _HALF, 4 * size)
            a, b, c, e = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
            for d in range(size):
                out[d] += (a * to_float(v[d]) + b * to_float(v[size + d])) + (
                    c * to_float(v[2 * size + d]) + e * to_float(v[3 * size + d])
                )
        for j in range(fours, count):
            v = halves(values + j * size * _HALF, size)
            for d in range(size):
                out[d] += weights[j] * to_float(v[d])

    @jit
    def attend(
        table: Any, job: Any, model: Any, layer: int, answer: int, head: int, stride: int,
        keep: int, thread: int,
    ) -> None:  # fmt: skip
        """Writes a head's new keys and values, then attends from its last `keep` positions.

        The queries come scaled: the converter has put the factor into the weights.
        """
        size, width, positions = model[t.HEAD_SIZE], model[t.WIDTH], model[t.POSITIONS]
        heads, rows, new = model[t.HEADS], job[t.CACHE_ROWS], job[t.NEW]
        start = words(job[t.STARTS], job[t.ANSWERS])[answer]
        half = rows * heads * positions * size * _HALF  # keys of all rows, or values
        keys = job[t.CACHE] + 2 * layer * half
        keys += (answer * heads + head) * positions * size * _HALF
        values = keys + half
        qkv = table[t.WIDE] + (answer * new * stride + head * size) * _FLOAT
        for i in range(new):
            k = floats(qkv + (i * stride + width) * _FLOAT, size)
            v = floats(qkv + (i * stride + 2 * width) * _FLOAT, size)
            kept_k = halves(keys + (start + i) * size * _HALF, size)
            kept_v = halves(values + (start + i) * size * _HALF, size)
            for d in range(size):
                kept_k[d] = to_half(k[d])
                kept_v[d] = to_half(v[d])
        scores = floats(table[t.SCORES] + thread * positions * _FLOAT, positions)
        for i in range(keep):
            position = new - keep + i
            count = start + position + 1
            q = floats(qkv + position * stride * _FLOAT, size)
            row = answer * keep + i
            out = floats(table[t.ATTENDED] + (row * width + head * size) * _FLOAT, size)
            largest = score(q, keys, count, size, scores)
            norm = _ZERO
            for j in range(count):
                scores[j] = exp(scores[j] - largest)
                norm += scores[j]
            mix(scores, values, count, size, out)
            for d in range(size):
                out[d] *= _ONE / norm

    return attend
