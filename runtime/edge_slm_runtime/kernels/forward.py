"""A pass of a decoder, all threads computing it together, layer by layer (`schedule`).

GPT-2 (Radford et al. 2019) and Llama (Touvron et al., arXiv 2302.13971) by their traits, which
are constants of the compiled code. Rows are the new tokens of all answers, answer after
answer. A row's result depends on nothing but itself and the keys and values before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.attention import make_attend, store_keys_and_values
from edge_slm_runtime.kernels.layers import (
    activate,
    add_bias,
    add_to,
    gate,
    normalise,
    rms_normalise,
)
from edge_slm_runtime.kernels.low_rank import expand, kept, shrink
from edge_slm_runtime.kernels.native import floats, inlined, jit, words
from edge_slm_runtime.kernels.product import make_product, quantise, unpack
from edge_slm_runtime.kernels.schedule import WORD, claimed, share, wait
from edge_slm_runtime.panels import LANES, PAIR

_FLOAT = 4  # bytes


def make_forward(vnni: bool, traits: Traits) -> Callable[..., None]:
    """forward(table, thread): one pass of a model with these traits."""
    product = make_product(vnni)
    norm = _make_norm(traits.norm == "rms")
    embed = _make_embed(traits.position == "learned")
    project = _make_project(product)
    attention = _make_attention(product, project, norm, traits.position == "rotary")
    feed_forward = _make_feed_forward(product, project, norm, traits.mlp == "gated")

    @jit
    def forward(table: Any, thread: int) -> None:
        control = words(table[t.CONTROL], t.SLEEPERS)
        threads, reached = control[t.THREADS], control[t.BASE]
        job, model = words(table[t.JOB], t.PASS), words(table[t.MODEL], t.FIRST_LAYER)
        levels, steps, sums = table[t.LEVELS], table[t.SCALES], table[t.SUMS]

        n, changes = job[t.TOKENS], job[t.CHANGES]
        first, last = share(n, thread, threads)  # as `attention` will share them
        for row in range(first, last):
            embed(table, job, row, model[t.WIDTH], table[t.RESIDUAL])
        for index in range(model[t.LAYERS]):
            # After the last layer's attention only some positions are asked for.
            kept_only = index == model[t.LAYERS] - 1
            reached = attention(table, thread, index, n, changes, kept_only, reached)
            if kept_only:
                n, changes = job[t.LAST], kept(changes, job)
            reached = feed_forward(table, thread, index, n, changes, reached)

        head, none = words(table[t.MODEL] + WORD * t.LM_HEAD, t.MATRIX), np.int64(0)
        norm(table, thread, n, model[t.FINAL_WEIGHT], model[t.FINAL_BIAS], head, none, none)
        reached = wait(table[t.CONTROL], reached, threads)
        stride, units = head[t.PANELS] * LANES, head[t.PANELS] // PAIR
        claims = table[t.CLAIMS] + WORD * t.CLAIM * model[t.LAYERS]
        number, first, last = claimed(claims, 0, 0, units, threads)
        while first < units:
            product(head, levels, steps, sums, n, job[t.LOGITS], stride, first * PAIR, last * PAIR)
            number, first, last = claimed(claims, number, first, units, threads)
        wait(table[t.CONTROL], reached, threads)

    return forward


def _make_project(product: Callable[..., None]) -> Callable[..., None]:
    @inlined
    def project(
        table: Any, claims: int, n: int, matrix: Any, levels: int, steps: int, sums: int,
        changes: int, number: int,
    ) -> None:  # fmt: skip
        """residual + bias + a product, of the pieces that this thread claims."""
        threads = words(table[t.CONTROL], t.SLEEPERS)[t.THREADS]
        width = words(table[t.MODEL], t.FIRST_LAYER)[t.WIDTH]
        x, wide = table[t.RESIDUAL], table[t.PRODUCT]
        stride, units = matrix[t.PANELS] * LANES, matrix[t.PANELS] // PAIR
        piece, first, last = claimed(claims, 0, 0, units, threads)
        while first < units:
            start, end = first * PAIR, last * PAIR
            product(matrix, levels, steps, sums, n, wide, stride, start, end)
            if changes:
                expand(table, changes, n, number, wide, stride, start, end)
            add_to(x, n, width, wide, stride, matrix[t.BIAS], start, end)
            piece, first, last = claimed(claims, piece, first, units, threads)

    return project


def _make_attention(
    product: Callable[..., None],
    project: Callable[..., None],
    norm: Callable[..., None],
    rotary: bool,
) -> Callable[..., int]:
    attend = make_attend(rotary)

    @inlined
    def attention(
        table: Any, thread: int, index: int, n: int, changes: int, kept_only: bool, reached: int
    ) -> int:
        """x + attention(norm(x)), from n positions or those whose logits are wanted."""
        threads = words(table[t.CONTROL], t.SLEEPERS)[t.THREADS]
        job, model = words(table[t.JOB], t.PASS), words(table[t.MODEL], t.FIRST_LAYER)
        heads, wide = model[t.HEADS], table[t.PRODUCT]
        levels, steps, sums = table[t.LEVELS], table[t.SCALES], table[t.SUMS]
        address = table[t.MODEL] + WORD * (t.FIRST_LAYER + t.LAYER * index)
        layer = words(address, t.LAYER)
        qkv = words(address + WORD * t.LAYER_QKV, t.MATRIX)
        out = words(address + WORD * t.LAYER_OUT, t.MATRIX)
        changed = t.CHANGED * index

        number = changed + t.CHANGED_QKV
        norm(table, thread, n, layer[t.NORM_1], layer[t.NORM_1_BIAS], qkv, changes, number)
        reached = wait(table[t.CONTROL], reached, threads)
        claims = table[t.CLAIMS] + WORD * t.CLAIM * index
        stride, units = qkv[t.PANELS] * LANES, qkv[t.PANELS] // PAIR
        piece, first, last = claimed(claims + WORD * t.QKV, 0, 0, units, threads)
        while first < units:
            start, end = first * PAIR, last * PAIR
            product(qkv, levels, steps, sums, n, wide, stride, start, end)
            if changes:
                expand(table, changes, n, number, wide, stride, start, end)
            add_bias(wide, n, stride, qkv[t.BIAS], start, end)
            piece, first, last = claimed(claims + WORD * t.QKV, piece, first, units, threads)
        reached = wait(table[t.CONTROL], reached, threads)
        if rotary:  # keys are shared by heads, which several threads compute
            store_keys_and_values(table, index, stride, thread, threads)
            reached = wait(table[t.CONTROL], reached, threads)

        units = job[t.ANSWERS] * heads
        piece, first, last = claimed(claims + WORD * t.HEAD, 0, 0, units, threads)
        while first < units:
            for i in range(first, last):
                attend(table, i // heads, index, i % heads, stride, kept_only, thread)
            piece, first, last = claimed(claims + WORD * t.HEAD, piece, first, units, threads)
        if kept_only:
            n, changes = job[t.LAST], kept(changes, job)
            if thread == 0:
                compact_rows(table[t.RESIDUAL], words(job[t.WANTED], n), model[t.WIDTH])
        reached = wait(table[t.CONTROL], reached, threads)

        first, last = share(n, thread, threads)
        for row in range(first, last):
            width = heads * model[t.HEAD_WIDTH]
            quantise_row(table[t.ATTENDED], row, width, out, levels, steps, sums)
            if changes:
                source = table[t.ATTENDED] + row * width * _FLOAT
                shrink(table, changes, row, changed + t.CHANGED_OUT, source)
        reached = wait(table[t.CONTROL], reached, threads)
        number = changed + t.CHANGED_OUT
        project(table, claims + WORD * t.OUT, n, out, levels, steps, sums, changes, number)
        return wait(table[t.CONTROL], reached, threads)

    return attention


def _make_feed_forward(
    product: Callable[..., None],
    project: Callable[..., None],
    norm: Callable[..., None],
    gated: bool,
) -> Callable[..., int]:
    matrices = 2 if gated else 1  # side by side in `up`

    @inlined
    def feed_forward(
        table: Any, thread: int, index: int, n: int, changes: int, reached: int
    ) -> int:
        """x + mlp(norm(x)). A thread quantises its own results for the second matrix, to a
        place after the activations of the first, which others may still read."""
        threads = words(table[t.CONTROL], t.SLEEPERS)[t.THREADS]
        wide, kind = table[t.PRODUCT], words(table[t.MODEL], t.FIRST_LAYER)[t.ACTIVATION]
        levels, steps, sums = table[t.LEVELS], table[t.SCALES], table[t.SUMS]
        address = table[t.MODEL] + WORD * (t.FIRST_LAYER + t.LAYER * index)
        layer = words(address, t.LAYER)
        up = words(address + WORD * t.LAYER_UP, t.MATRIX)
        down = words(address + WORD * t.LAYER_DOWN, t.MATRIX)
        changed = t.CHANGED * index

        number = changed + t.CHANGED_UP
        norm(table, thread, n, layer[t.NORM_2], layer[t.NORM_2_BIAS], up, changes, number)
        reached = wait(table[t.CONTROL], reached, threads)
        claims = table[t.CLAIMS] + WORD * t.CLAIM * index
        stride, size = up[t.PANELS] * LANES, down[t.SIZE]
        hidden, columns = (table[t.GATED] if gated else wide), stride // matrices
        inner = min(columns, down[t.BLOCKS] * size)
        levels_2 = levels + n * up[t.BLOCKS] * up[t.SIZE]
        steps_2, sums_2 = steps + n * up[t.BLOCKS] * _FLOAT, sums + n * up[t.BLOCKS] * _FLOAT
        unit = max(size // LANES * matrices, PAIR)  # no block is quantised by two threads
        units = -(-up[t.PANELS] // unit)
        piece, first, last = claimed(claims + WORD * t.UP, 0, 0, units, threads)
        while first < units:
            start, end = first * unit, min(last * unit, up[t.PANELS])
            product(up, levels, steps, sums, n, wide, stride, start, end)
            if changes:
                expand(table, changes, n, number, wide, stride, start, end)
            if gated:
                gate(wide, n, stride, up[t.BIAS], start, end, kind, hidden)
            else:
                activate(wide, n, stride, up[t.BIAS], start, end, kind)
            start = start * LANES // (size * matrices)
            end = min(-(-end * LANES // (size * matrices)), down[t.BLOCKS])
            for row in range(n):
                quantise(hidden, row, columns, inner, down, start, end, levels_2, steps_2, sums_2)
            piece, first, last = claimed(claims + WORD * t.UP, piece, first, units, threads)
        reached = wait(table[t.CONTROL], reached, threads)
        if changes:  # of whole rows, which several threads have made
            first, last = share(n, thread, threads)
            for row in range(first, last):
                source = hidden + row * columns * _FLOAT
                shrink(table, changes, row, changed + t.CHANGED_DOWN, source)
            reached = wait(table[t.CONTROL], reached, threads)
        number = changed + t.CHANGED_DOWN
        project(table, claims + WORD * t.DOWN, n, down, levels_2, steps_2, sums_2, changes, number)
        return wait(table[t.CONTROL], reached, threads)

    return feed_forward


def _make_embed(learned: bool) -> Callable[..., None]:
    @jit
    def embed(table: Any, job: Any, row: int, width: int, x: int) -> None:
        """The embedding of a token, plus that of its position where these are learned."""
        token = words(job[t.IDS], job[t.TOKENS])[row]
        here = floats(x + row * width * _FLOAT, width)
        unpack(words(table[t.MODEL] + WORD * t.EMBEDDING, t.MATRIX), token, here)
        if learned:
            place = words(job[t.PLACES], job[t.TOKENS])[row]
            positions = words(table[t.MODEL], t.FIRST_LAYER)[t.POSITION_TABLE]
            added = floats(positions + place * width * _FLOAT, width)
            for i in range(width):
                here[i] += added[i]

    return embed


def _make_norm(rms: bool) -> Callable[..., None]:
    @jit
    def norm(
        table: Any, thread: int, n: int, weight: int, bias: int, matrix: Any, changes: int,
        number: int,
    ) -> None:  # fmt: skip
        """This thread's rows of the residual, normalised, in 8 bits for `matrix`."""
        model = words(table[t.MODEL], t.FIRST_LAYER)
        width, target = model[t.WIDTH], table[t.ATTENDED]
        epsilon = floats(table[t.MODEL] + WORD * t.EPSILON, 1)[0]
        first, last = share(n, thread, words(table[t.CONTROL], t.SLEEPERS)[t.THREADS])
        for row in range(first, last):
            if rms:
                rms_normalise(table[t.RESIDUAL], row, width, weight, epsilon, target)
            else:
                normalise(table[t.RESIDUAL], row, width, weight, bias, epsilon, target)
            quantise_row(
                target, row, width, matrix, table[t.LEVELS], table[t.SCALES], table[t.SUMS]
            )
            if changes:
                shrink(table, changes, row, number, target + row * width * _FLOAT)

    return norm


@jit
def quantise_row(
    source: int, row: int, width: int, matrix: Any, levels: int, steps: int, sums: int
) -> None:
    """All blocks of a row in 8 bits."""
    quantise(source, row, width, width, matrix, 0, matrix[t.BLOCKS], levels, steps, sums)


@jit
def compact_rows(x: int, wanted: Any, width: int) -> None:
    """Moves the rows whose logits are wanted to the front."""
    for row in range(len(wanted)):
        old = floats(x + wanted[row] * width * _FLOAT, width)
        here = floats(x + row * width * _FLOAT, width)
        for i in range(width):
            here[i] = old[i]
