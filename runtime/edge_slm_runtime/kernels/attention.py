"""Causal self-attention of a head over keys and values in the cache."""

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


@jit
def rotate(values: int, size: int, table: int) -> None:
    """Rotates each pair of dimensions (i, i + size / 2) by the angle of a position (Su et al.,
    arXiv 2104.09864). table: size / 2 cosines, then as many sines."""
    half = size // 2
    x, y = floats(values, half), floats(values + half * _FLOAT, half)
    cosine, sine = floats(table, half), floats(table + half * _FLOAT, half)
    for i in range(half):
        a, b = x[i], y[i]
        x[i] = a * cosine[i] - b * sine[i]
        y[i] = b * cosine[i] + a * sine[i]


@jit
def keys_of(table: Any, answer: int, layer: int, head: int) -> Any:
    """Addresses of the keys and of the values of a key-value head of an answer in a layer."""
    job, model = words(table[t.JOB], t.PASS), words(table[t.MODEL], t.FIRST_LAYER)
    size, positions = model[t.HEAD_WIDTH], model[t.POSITIONS]
    width = model[t.KV_HEADS] * size
    part = words(job[t.PARTS] + answer * t.PART * 8, t.PART)
    half = job[t.CACHE_ROWS] * width * positions * _HALF  # keys of all rows, or values
    keys = job[t.CACHE] + 2 * layer * half
    keys += (part[t.ROW] * width + head * size) * positions * _HALF
    return keys, keys + half


@jit
def store_keys_and_values(table: Any, layer: int, stride: int, thread: int, threads: int) -> None:
    """Rotates this thread's share of the new queries in place, and writes its share of the
    new keys, rotated, and values to the cache."""
    job, model = words(table[t.JOB], t.PASS), words(table[t.MODEL], t.FIRST_LAYER)
    size, heads, kv_heads = model[t.HEAD_WIDTH], model[t.HEADS], model[t.KV_HEADS]
    slots = heads + kv_heads
    for answer in range(job[t.ANSWERS]):
        part = words(job[t.PARTS] + answer * t.PART * 8, t.PART)
        start = words(job[t.STARTS], job[t.ANSWERS])[answer]
        count = part[t.NEW] * slots
        for index in range(count * thread // threads, count * (thread + 1) // threads):
            i, slot = index // slots, index % slots
            row = table[t.PRODUCT] + (part[t.FIRST] + i) * stride * _FLOAT
            place = row + slot * size * _FLOAT
            rotate(place, size, model[t.POSITION_TABLE] + (start + i) * size * _FLOAT)
            if slot >= heads:
                keys, values = keys_of(table, answer, layer, slot - heads)
                halve(place, size, keys + (start + i) * size * _HALF)
                place += kv_heads * size * _FLOAT
                halve(place, size, values + (start + i) * size * _HALF)


def make_attend(usual: int, stored: bool) -> Callable[..., None]:
    """attend(table, answer, layer, head, stride, kept_only, thread): for heads of the `usual`
    size, whose loops the compiler then unrolls; 0 is for all. stored: the new keys and values
    are in the cache; else each head has its own and writes them."""
    score, mix = _make_score(usual), _make_mix(usual)

    @jit
    def attend(
        table: Any, answer: int, layer: int, head: int, stride: int, kept_only: bool, thread: int
    ) -> None:
        """Attends from the new positions of a part of the pass, or from those whose logits are
        wanted, with one query head.

        The queries come scaled: the converter has put the factor into the weights.
        """
        job, model = words(table[t.JOB], t.PASS), words(table[t.MODEL], t.FIRST_LAYER)
        size, positions = model[t.HEAD_WIDTH], model[t.POSITIONS]
        group = model[t.HEADS] // model[t.KV_HEADS]  # query heads that share keys
        width = model[t.HEADS] * size
        part = words(job[t.PARTS] + answer * t.PART * 8, t.PART)
        start, new = words(job[t.STARTS], job[t.ANSWERS])[answer], part[t.NEW]
        keys, values = keys_of(table, answer, layer, head // group)
        qkv = table[t.PRODUCT] + (part[t.FIRST] * stride + head * size) * _FLOAT
        if not stored:
            for i in range(new):
                place = (start + i) * size * _HALF
                halve(qkv + (i * stride + width) * _FLOAT, size, keys + place)
                halve(qkv + (i * stride + 2 * width) * _FLOAT, size, values + place)
        # The next head's, or the next answer's first: no processor foresees that.
        ahead = positions * size * _HALF if new == 1 and (head + 1) % group == 0 else 0
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
        """Products of a query and its first `count` keys; returns the largest. Memory `ahead`
        bytes further will be needed next."""
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
