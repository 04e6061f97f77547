"""GPT-2 (Radford et al. 2019), all threads going through it together, layer by layer.

Rows are the new tokens of all answers, answer after answer. A thread computes its share of
the rows, and pieces of the heads or of the outputs of a matrix as long as there are any, since
cores are seldom equally fast; it waits for the others wherever the next step needs theirs. What
a row gets depends on nothing but itself and the keys and values before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.attention import make_attend
from edge_slm_runtime.kernels.layers import activate, add_bias, add_to, normalise
from edge_slm_runtime.kernels.native import (
    atomic_add,
    atomic_load,
    atomic_swap,
    call,
    floats,
    jit,
    prefetch,
    spin_pause,
    store_zero_word,
    words,
)
from edge_slm_runtime.kernels.product import make_product, quantise, unpack
from edge_slm_runtime.panels import LANES, PAIR

_WORD, _FLOAT, _LINE, _PAGE = 8, 4, 64, 4096  # bytes
_USUAL_HEAD = 64
_SPINS_BEFORE_YIELD = 1 << 6  # a microsecond or two: who is awaited may be in line for this core
_SPINS_BEFORE_SLEEP = 1 << 17  # some milliseconds: longer than Python takes between two passes


def make_forward(vnni: bool) -> Callable[..., None]:
    """forward(table, thread): one pass of the model."""
    product = make_product(vnni)
    project = _make_project(product)
    attention = _make_attention(product, project)
    feed_forward = _make_feed_forward(product, project)

    @jit
    def forward(table: Any, thread: int) -> None:
        control = words(table[t.CONTROL], t.SLEEPERS)
        threads, reached = control[t.THREADS], control[t.BASE]
        job, model = words(table[t.JOB], t.PASS), words(table[t.MODEL], t.FIRST_LAYER)
        levels, steps, sums = table[t.LEVELS], table[t.SCALES], table[t.SUMS]

        n = job[t.TOKENS]
        first, last = share(n, thread, threads)  # as `attention` will share them
        for row in range(first, last):
            embed(table, job, row, model[t.WIDTH], table[t.RESIDUAL])
        for index in range(model[t.LAYERS]):
            # Behind the last layer's attention only some positions are asked for.
            kept_only = index == model[t.LAYERS] - 1
            reached = attention(table, thread, index, n, kept_only, reached)
            if kept_only:
                n = job[t.LAST]
            reached = feed_forward(table, thread, index, n, reached)

        head = words(table[t.MODEL] + _WORD * t.LM_HEAD, t.MATRIX)
        norm(table, thread, n, model[t.FINAL_WEIGHT], model[t.FINAL_BIAS], head)
        reached = wait(table[t.CONTROL], reached, threads)
        stride, units = head[t.PANELS] * LANES, head[t.PANELS] // PAIR
        claims = table[t.CLAIMS] + _WORD * t.CLAIM * model[t.LAYERS]
        number, first, last = claimed(claims, 0, 0, units, threads)
        while first < units:
            product(head, levels, steps, sums, n, job[t.LOGITS], stride, first * PAIR, last * PAIR)
            number, first, last = claimed(claims, number, first, units, threads)
        wait(table[t.CONTROL], reached, threads)

    return forward


def _make_project(product: Callable[..., None]) -> Callable[..., None]:
    @jit
    def project(
        table: Any, claims: int, n: int, matrix: Any, levels: int, steps: int, sums: int
    ) -> None:
        """x + bias + a product, of the pieces that this thread gets."""
        threads = words(table[t.CONTROL], t.SLEEPERS)[t.THREADS]
        width = words(table[t.MODEL], t.FIRST_LAYER)[t.WIDTH]
        x, wide = table[t.RESIDUAL], table[t.PRODUCT]
        stride, units = matrix[t.PANELS] * LANES, matrix[t.PANELS] // PAIR
        number, first, last = claimed(claims, 0, 0, units, threads)
        while first < units:
            start, end = first * PAIR, last * PAIR
            product(matrix, levels, steps, sums, n, wide, stride, start, end)
            add_to(x, n, width, wide, stride, matrix[t.BIAS], start, end)
            number, first, last = claimed(claims, number, first, units, threads)

    return project


def _make_attention(
    product: Callable[..., None], project: Callable[..., None]
) -> Callable[..., int]:
    attend_usual, attend_any = make_attend(_USUAL_HEAD), make_attend(0)

    @jit
    def attention(
        table: Any, thread: int, index: int, n: int, kept_only: bool, reached: int
    ) -> int:
        """x + attention(norm(x)), from n positions or those whose logits are wanted."""
        threads = words(table[t.CONTROL], t.SLEEPERS)[t.THREADS]
        job, model = words(table[t.JOB], t.PASS), words(table[t.MODEL], t.FIRST_LAYER)
        width, heads, wide = model[t.WIDTH], model[t.HEADS], table[t.PRODUCT]
        levels, steps, sums = table[t.LEVELS], table[t.SCALES], table[t.SUMS]
        address = table[t.MODEL] + _WORD * (t.FIRST_LAYER + t.LAYER * index)
        layer = words(address, t.LAYER)
        c_attn = words(address + _WORD * t.C_ATTN, t.MATRIX)
        c_proj = words(address + _WORD * t.C_PROJ, t.MATRIX)

        norm(table, thread, n, layer[t.NORM_1], layer[t.NORM_1_BIAS], c_attn)
        reached = wait(table[t.CONTROL], reached, threads)
        claims = table[t.CLAIMS] + _WORD * t.CLAIM * index
        stride, units = c_attn[t.PANELS] * LANES, c_attn[t.PANELS] // PAIR
        number, first, last = claimed(claims + _WORD * t.QKV, 0, 0, units, threads)
        while first < units:
            start, end = first * PAIR, last * PAIR
            product(c_attn, levels, steps, sums, n, wide, stride, start, end)
            add_bias(wide, n, stride, c_attn[t.BIAS], start, end)
            number, first, last = claimed(claims + _WORD * t.QKV, number, first, units, threads)
        reached = wait(table[t.CONTROL], reached, threads)

        units = job[t.ANSWERS] * heads
        number, first, last = claimed(claims + _WORD * t.HEAD, 0, 0, units, threads)
        while first < units:
            for i in range(first, last):
                if model[t.HEAD_SIZE] == _USUAL_HEAD:
                    attend_usual(table, i // heads, index, i % heads, stride, kept_only, thread)
                else:
                    attend_any(table, i // heads, index, i % heads, stride, kept_only, thread)
            number, first, last = claimed(claims + _WORD * t.HEAD, number, first, units, threads)
        if kept_only:
            n = job[t.LAST]
            if thread == 0:
                compact_rows(table[t.RESIDUAL], words(job[t.WANTED], n), width)
        reached = wait(table[t.CONTROL], reached, threads)

        first, last = share(n, thread, threads)
        for row in range(first, last):
            quantise_row(table[t.ATTENDED], row, width, c_proj, levels, steps, sums)
        reached = wait(table[t.CONTROL], reached, threads)
        project(table, claims + _WORD * t.OUT, n, c_proj, levels, steps, sums)
        return wait(table[t.CONTROL], reached, threads)

    return attention


def _make_feed_forward(
    product: Callable[..., None], project: Callable[..., None]
) -> Callable[..., int]:
    @jit
    def feed_forward(table: Any, thread: int, index: int, n: int, reached: int) -> int:
        """x + mlp(norm(x)). A thread rounds what it computed itself for the second matrix, to a
        place behind what it was computed from, which others may still read."""
        threads = words(table[t.CONTROL], t.SLEEPERS)[t.THREADS]
        wide, kind = table[t.PRODUCT], words(table[t.MODEL], t.FIRST_LAYER)[t.ACTIVATION]
        levels, steps, sums = table[t.LEVELS], table[t.SCALES], table[t.SUMS]
        address = table[t.MODEL] + _WORD * (t.FIRST_LAYER + t.LAYER * index)
        layer = words(address, t.LAYER)
        c_fc = words(address + _WORD * t.C_FC, t.MATRIX)
        c_proj = words(address + _WORD * t.MLP_PROJ, t.MATRIX)

        norm(table, thread, n, layer[t.NORM_2], layer[t.NORM_2_BIAS], c_fc)
        reached = wait(table[t.CONTROL], reached, threads)
        claims = table[t.CLAIMS] + _WORD * t.CLAIM * index
        stride, size = c_fc[t.PANELS] * LANES, c_proj[t.SIZE]
        inner = min(stride, c_proj[t.BLOCKS] * size)
        levels_2 = levels + n * c_fc[t.BLOCKS] * c_fc[t.SIZE]
        steps_2, sums_2 = steps + n * c_fc[t.BLOCKS] * _FLOAT, sums + n * c_fc[t.BLOCKS] * _FLOAT
        unit = max(size // LANES, PAIR)  # no block is rounded by two threads
        units = -(-c_fc[t.PANELS] // unit)
        number, first, last = claimed(claims + _WORD * t.FC, 0, 0, units, threads)
        while first < units:
            start, end = first * unit, min(last * unit, c_fc[t.PANELS])
            product(c_fc, levels, steps, sums, n, wide, stride, start, end)
            activate(wide, n, stride, c_fc[t.BIAS], start, end, kind)
            start, end = start * LANES // size, min(-(-end * LANES // size), c_proj[t.BLOCKS])
            for row in range(n):
                quantise(wide, row, stride, inner, c_proj, start, end, levels_2, steps_2, sums_2)
            number, first, last = claimed(claims + _WORD * t.FC, number, first, units, threads)
        reached = wait(table[t.CONTROL], reached, threads)
        project(table, claims + _WORD * t.MLP, n, c_proj, levels_2, steps_2, sums_2)
        return wait(table[t.CONTROL], reached, threads)

    return feed_forward


def make_entry(vnni: bool) -> Callable[[int, int], int]:
    """entry(address of a table, thread): what threads call. See `engines.thread_team`."""
    forward = make_forward(vnni)

    @jit
    def entry(address: int, thread: int) -> int:
        """thread -1: says that a job is coming, so that nobody goes to sleep; returns a bit for
        each thread that does: wake it, then call with 0. When none does, goes on as that. 0:
        hands the job out, computes it with the others, returns 0. Others: compute jobs until
        there was none for a while; 0, and to be called again when woken, or 1 at the end of all.
        """
        table = words(address, t.TABLE)
        control = words(table[t.CONTROL], t.SLEEPERS)
        epoch = table[t.CONTROL] + _WORD * t.EPOCH
        coming = table[t.CONTROL] + _WORD * t.COMING
        sleepers = table[t.CONTROL] + _WORD * t.SLEEPERS
        if thread < 0:
            atomic_swap(coming, 1)
            asleep = 0
            for other in range(1, control[t.THREADS]):
                asleep |= atomic_load(sleepers + _WORD * t.LINE * other) << other
            if asleep:
                return asleep
        if thread <= 0:
            control[t.BASE] = atomic_load(table[t.CONTROL] + _WORD * t.BARRIER)
            layers = words(table[t.MODEL], t.FIRST_LAYER)[t.LAYERS]
            for i in range(t.CLAIM * (layers + 1)):
                store_zero_word(table[t.CLAIMS] + _WORD * i)
            atomic_add(epoch, 1)
            forward(table, 0)
            atomic_swap(coming, 0)
            return 0
        sleeper = sleepers + _WORD * t.LINE * thread
        done = words(sleeper + _WORD, 1)  # the last job that this thread computed
        atomic_swap(sleeper, 0)
        spins = 0
        while not atomic_load(table[t.CONTROL] + _WORD * t.STOP):
            now = atomic_load(epoch)
            if now != done[0]:
                done[0] = now
                forward(table, thread)
                prefetch_first_layer(table, epoch, now)
                spins = 0
            spins = spin_pause(spins)
            if spins > _SPINS_BEFORE_SLEEP:
                atomic_swap(sleeper, 1)
                # A caller either finds this thread asleep, and wakes it, or is seen here.
                if atomic_load(epoch) == now and not atomic_load(coming):
                    return 0
                atomic_swap(sleeper, 0)
                spins = 0
        return 1

    return entry


@jit
def prefetch_first_layer(table: Any, epoch: int, now: int) -> None:
    """Brings the first layer's matrices nearer, until there is a new job: while the caller
    chooses a token the memory would have nothing to do."""
    address = table[t.MODEL] + _WORD * t.FIRST_LAYER
    for place in (t.C_ATTN, t.C_PROJ, t.C_FC, t.MLP_PROJ):
        matrix = words(address + _WORD * place, t.MATRIX)
        weights = matrix[t.PANELS] * LANES * matrix[t.BLOCKS] * matrix[t.SIZE]
        for page in range(0, weights * matrix[t.BITS] // 8, _PAGE):
            if atomic_load(epoch) != now:
                return
            for line in range(0, _PAGE, _LINE):
                prefetch(matrix[t.LEVEL] + page + line)


@jit
def share(count: int, thread: int, threads: int) -> Any:
    """The part of 0 … count that is this thread's."""
    return count * thread // threads, count * (thread + 1) // threads


@jit
def claimed(claims: int, number: int, first: int, units: int, threads: int) -> Any:
    """The next piece of 0 … units, by the claims made so far: its number, its first unit and
    the one behind its last. number, first: of an earlier piece. At the end first is `units`.

    A piece is half of a thread's share of what is left (guided self-scheduling,
    Polychronopoulos and Kuck 1987): long ones first, which memory likes, and short ones to
    end together.
    """
    mine = atomic_add(claims, 1)
    while number < mine and first < units:
        first += max((units - first) // (2 * threads), 1)
        number += 1
    return number, first, first + max((units - first) // (2 * threads), 1)


@jit
def wait(control: int, reached: int, threads: int) -> int:
    """Until every thread has come here; returns how many arrivals that makes in all."""
    reached += threads
    barrier = control + _WORD * t.BARRIER
    atomic_add(barrier, 1)
    spins = 0
    while atomic_load(barrier) < reached:
        spins = spin_pause(spins)
        if spins % _SPINS_BEFORE_YIELD == 0:
            call(words(control, t.SLEEPERS)[t.YIELD])
    return reached


@jit
def embed(table: Any, job: Any, row: int, width: int, x: int) -> None:
    """The embedding of a token plus that of its position."""
    token = words(job[t.IDS], job[t.TOKENS])[row]
    place = words(job[t.PLACES], job[t.TOKENS])[row]
    model = words(table[t.MODEL], t.FIRST_LAYER)
    added = floats(model[t.POSITION_TABLE] + place * width * _FLOAT, width)
    here = floats(x + row * width * _FLOAT, width)
    unpack(words(table[t.MODEL] + _WORD * t.EMBEDDING, t.MATRIX), token, here)
    for i in range(width):
        here[i] += added[i]


@jit
def norm(table: Any, thread: int, n: int, weight: int, bias: int, matrix: Any) -> None:
    """This thread's rows of x, normalised, in 8 bits for `matrix`."""
    model = words(table[t.MODEL], t.FIRST_LAYER)
    width, target = model[t.WIDTH], table[t.ATTENDED]
    epsilon = floats(table[t.MODEL] + _WORD * t.EPSILON, 1)[0]
    first, last = share(n, thread, words(table[t.CONTROL], t.SLEEPERS)[t.THREADS])
    for row in range(first, last):
        normalise(table[t.RESIDUAL], row, width, weight, bias, epsilon, target)
        quantise_row(target, row, width, matrix, table[t.LEVELS], table[t.SCALES], table[t.SUMS])


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
