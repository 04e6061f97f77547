"""How threads share a pass: jobs, shares, pieces, barriers. Knows no model.

Threads go through the layers together. Each computes its share of the rows, and pieces of the
heads or of a matrix's outputs as long as there are any, since cores are seldom equally fast;
it waits for the others wherever the next step needs their results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.native import (
    atomic_add,
    atomic_load,
    atomic_swap,
    call,
    jit,
    prefetch,
    spin_pause,
    store_zero_word,
    words,
)
from edge_slm_runtime.panels import LANES

WORD = 8  # bytes of a table's field
_LINE, _PAGE = 64, 4096  # bytes
_SPINS_BEFORE_YIELD = 1 << 6  # a microsecond or two: the other may be in line for this core
_SPINS_BEFORE_SLEEP = 1 << 17  # some milliseconds: longer than Python takes between two passes


def make_entry(forward: Callable[..., None]) -> Callable[[int, int], int]:
    """entry(address of a table, thread), which threads call, to be compiled; forward(table,
    thread) computes a pass. See `engines.thread_team`."""

    def entry(address: int, thread: int) -> int:
        """A negative thread is the address of a job, negated: hands it out, computes it with
        the others and returns 0. But while threads sleep, returns a bit for each of them: wake
        them and call again, since no other goes to sleep meanwhile; -1 after the end of all.
        Others: compute jobs until there was none for a while; 0, and to be called again when
        woken, or 1 at the end of all.
        """
        table = words(address, t.TABLE)
        control = words(table[t.CONTROL], t.SLEEPERS)
        epoch = table[t.CONTROL] + WORD * t.EPOCH
        coming = table[t.CONTROL] + WORD * t.COMING
        stop = table[t.CONTROL] + WORD * t.STOP
        sleepers = table[t.CONTROL] + WORD * t.SLEEPERS
        if thread < 0:
            woken = atomic_swap(coming, 1)
            asleep, spins = 1, 0
            while asleep and spins < _SPINS_BEFORE_SLEEP:
                if atomic_load(stop):
                    return -1
                asleep = 0
                for other in range(1, control[t.THREADS]):
                    asleep |= atomic_load(sleepers + WORD * t.LINE * other) << other
                if asleep and not woken:
                    return asleep
                spins = spin_pause(spins)
                if asleep:
                    call(control[t.YIELD])
            if asleep:
                return asleep
            table[t.JOB] = -thread
            control[t.BASE] = atomic_load(table[t.CONTROL] + WORD * t.BARRIER)
            layers = words(table[t.MODEL], t.FIRST_LAYER)[t.LAYERS]
            for i in range(t.CLAIM * (layers + 1)):
                store_zero_word(table[t.CLAIMS] + WORD * i)
            atomic_add(epoch, 1)
            forward(table, np.int64(0))  # 0 has a type of its own: all would be compiled twice
            atomic_swap(coming, 0)
            return 0
        sleeper = sleepers + WORD * t.LINE * thread
        done = words(sleeper + WORD, 1)  # the last job that this thread computed
        atomic_swap(sleeper, 0)
        spins = 0
        while not atomic_load(stop):
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
    """Fetches the first layer's matrices into the cache until there is a new job: memory is
    idle while the caller samples a token."""
    address = table[t.MODEL] + WORD * t.FIRST_LAYER
    for place in (t.LAYER_QKV, t.LAYER_OUT, t.LAYER_UP, t.LAYER_DOWN):
        matrix = words(address + WORD * place, t.MATRIX)
        weights = matrix[t.PANELS] * LANES * matrix[t.BLOCKS] * matrix[t.SIZE]
        for page in range(0, weights * matrix[t.BITS] // 8, _PAGE):
            if atomic_load(epoch) != now:
                return
            for line in range(0, _PAGE, _LINE):
                prefetch(matrix[t.LEVEL] + page + line)


@jit
def share(count: int, thread: int, threads: int) -> Any:
    """This thread's part of 0 … count: its first and the one after its last."""
    return count * thread // threads, count * (thread + 1) // threads


@jit
def claimed(claims: int, number: int, first: int, units: int, threads: int) -> Any:
    """The next piece of 0 … units, by the claims made so far: its number, its first unit and
    the one after its last. number, first: of an earlier piece. At the end first is `units`.

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
    """Waits until every thread has arrived here; returns the number of all arrivals."""
    reached += threads
    barrier = control + WORD * t.BARRIER
    atomic_add(barrier, 1)
    spins = 0
    while atomic_load(barrier) < reached:
        spins = spin_pause(spins)
        if spins % _SPINS_BEFORE_YIELD == 0:
            call(words(control, t.SLEEPERS)[t.YIELD])
    return reached
