"""Causal self-attention of a head over keys and values in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.heads import make_dot, make_mix
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
from edge_slm_runtime.panels import LANES

_ZERO, _ONE, _LEAST = np.float32(0), np.float32(1), np.float32(-np.inf)
_FLOAT, _HALF, _LINE = 4, 2, 64  # bytes
_BLOCKS, _CHUNKS = 4, 4  # of keys and of dimensions that are computed together


@jit
def halve(source: int, count: int, target: int) -> None:
    x, y = floats(source, count), halves(target, count)
    for i in range(count):
        y[i] = to_half(x[i])


@jit
def store_key(source: int, size: int, keys: int, position: int) -> None:
    """Into its lane of the keys of a head, float16 [blocks of 16 positions, size, 16]."""
    x = floats(source, size)
    place = (position // LANES * size * LANES + position % LANES) * _HALF
    y = halves(keys + place, size * LANES)
    for i in range(size):
        y[i * LANES] = to_half(x[i])


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
                store_key(place, size, keys, start + i)
                place += kv_heads * size * _FLOAT
                halve(place, size, values + (start + i) * size * _HALF)


def make_attend(stored: bool) -> Callable[..., None]:
    """attend(table, answer, layer, head, stride, kept_only, thread). stored: the new keys and
    values are in the cache; else each head has its own and writes them."""
    one, several = _make_rows(1), _make_rows(t.QUERIES)

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
                row = qkv + i * stride * _FLOAT
                store_key(row + width * _FLOAT, size, keys, start + i)
                place = values + (start + i) * size * _HALF
                halve(row + 2 * width * _FLOAT, size, place)
        # The next head's, or the next answer's first: no processor foresees that.
        ahead = positions * size * _HALF if new == 1 and (head + 1) % group == 0 else 0
        scores = table[t.SCORES] + thread * t.QUERIES * positions * _FLOAT
        i, row = (new - part[t.KEPT], part[t.FIRST_KEPT]) if kept_only else (0, part[t.FIRST])
        while i < new:
            q = qkv + i * stride * _FLOAT
            out = table[t.ATTENDED] + (row * width + head * size) * _FLOAT
            count = start + i + 1
            if new - i >= t.QUERIES:
                several(q, stride, keys, values, count, size, ahead, scores, positions, out, width)
                i, row = i + t.QUERIES, row + t.QUERIES
            else:
                one(q, stride, keys, values, count, size, ahead, scores, positions, out, width)
                i, row = i + 1, row + 1

    return attend


def _make_rows(queries: int) -> Callable[..., None]:
    """rows(q, q_stride, keys, values, count, size, ahead, scores, positions, out, out_stride):
    softmax(q · keys) · values for so many queries, the first of which sees `count` keys and
    each of the others one more. Memory `ahead` bytes further will be needed next."""
    score, mix = _make_score(queries), _make_sum(queries)

    @jit
    def rows(
        q: int, q_stride: int, keys: int, values: int, count: int, size: int, ahead: int,
        scores: int, positions: int, out: int, out_stride: int,
    ) -> None:  # fmt: skip
        if ahead:
            for place in range(0, count * size * _HALF, _LINE):
                prefetch(keys + ahead + place)
                prefetch(values + ahead + place)
        score(q, q_stride, keys, count + queries - 1, size, scores, positions)
        for row in range(queries):
            softmax(scores + row * positions * _FLOAT, count + row)
        mix(scores, positions, values, count, size, out, out_stride)

    return rows


def _make_score(queries: int) -> Callable[..., None]:
    dots, dot = make_dot(queries, _BLOCKS), make_dot(queries, 1)

    @jit
    def score(
        q: int, q_stride: int, keys: int, count: int, size: int, scores: int, positions: int
    ) -> None:
        """Products of the queries with `count` keys, and with others up to a whole block."""
        blocks = (count + LANES - 1) // LANES
        block = 0
        while block < blocks:
            here, out = keys + block * size * LANES * _HALF, scores + block * LANES * _FLOAT
            if blocks - block >= _BLOCKS:
                dots(q, here, size, out, q_stride, positions)
                block += _BLOCKS
            else:
                dot(q, here, size, out, q_stride, positions)
                block += 1

    return score


def _make_sum(queries: int) -> Callable[..., None]:
    wide, narrow = make_mix(queries, _CHUNKS), make_mix(queries, 1)
    wide_rest, narrow_rest = make_mix(1, _CHUNKS, more=True), make_mix(1, 1, more=True)

    @jit
    def add(
        scores: int, positions: int, values: int, count: int, size: int, out: int, stride: int
    ) -> None:
        """Weighted sums of the values: `count` for the first query, one more for each next."""
        d = 0
        while d + LANES <= size:
            v, target, whole = values + d * _HALF, out + d * _FLOAT, size - d >= _CHUNKS * LANES
            if whole:
                wide(scores, v, count, size, target, positions, stride)
            else:
                narrow(scores, v, count, size, target, positions, stride)
            for row in range(1, queries):  # the values that not all of the queries see
                w = scores + (row * positions + count) * _FLOAT
                rest, place = v + count * size * _HALF, target + row * stride * _FLOAT
                if whole:
                    wide_rest(w, rest, row, size, place, 0, 0)
                else:
                    narrow_rest(w, rest, row, size, place, 0, 0)
            d += _CHUNKS * LANES if whole else LANES
        for row in range(queries):  # of heads that are no whole vectors
            weights = floats(scores + row * positions * _FLOAT, count + row)
            target, v = floats(out + row * stride * _FLOAT, size), halves(values, 1)
            for column in range(d, size):
                total = _ZERO
                for j in range(count + row):
                    v = halves(values + (j * size + column) * _HALF, 1)
                    total += weights[j] * to_float(v[0])
                target[column] = total

    return add


@jit
def softmax(scores: int, count: int) -> None:
    """In the place of the scores."""
    s = floats(scores, count)
    largest = _LEAST
    for j in range(count):
        largest = max(largest, s[j])
    total = _ZERO
    for j in range(count):
        s[j] = exp(s[j] - largest)
        total += s[j]
    scale = _ONE / total
    for j in range(count):
        s[j] *= scale
