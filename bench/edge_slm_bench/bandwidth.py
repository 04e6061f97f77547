"""How fast this machine reads memory: the floor under every decode step.

A decode step reads all weights once, so it cannot take less than weight bytes ÷
bandwidth. What is measured here is what a plain read reaches (as STREAM does for its
kernels, McCalpin 1995), so it is itself a lower bound of what the hardware can do, and a
step of a model that partly stays in the cache may pass it.

Machines with neighbours read twice as fast in one second as in the next. So it is measured
just before each process whose steps are held against it: by the median pass, as steps are
reported by their median, and by the best one, which shows the memory undisturbed.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_slm_bench.machine import cache_kb, memory_limit_mb, memory_mb

_LEAST_PASSES = 3
_CACHES = 4  # times the last-level cache, so that at most a quarter of a pass can be hits


class Bandwidth(NamedTuple):
    """Bytes/s."""

    median: float
    best: float


def read_bandwidth(threads: int, megabytes: int = 128, seconds: float = 0.25) -> Bandwidth:
    """Of the median and the best pass over an array that does not fit into the caches.

    threads: Python threads, a slice of the array each. megabytes (2²⁰ bytes): raised
    to four times the last-level cache, lowered to a quarter of the free memory. seconds:
    how long passes are repeated, after three.

    A pass is `np.maximum.reduce` over int32, which releases the GIL and, of numpy's
    reductions, computes least: from the second-level cache it read 123 GB/s per core with
    AVX-512 and 100 with AVX2, against 115 and 84 of floats, 90 and 66 of np.dot (whose
    BLAS starts threads of its own), 52 of bitwise_or. Memory is the slower side.

    Raises ValueError for less than one thread.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    # Written to: pages that were never written are one page of zeros, which stays in the cache.
    array = np.ones(_array_bytes(megabytes) // 4, np.int32)
    slices = np.array_split(array, threads)
    passes: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while len(passes) < _LEAST_PASSES or time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(_read, slices))
            passes.append(time.perf_counter() - start)
    return Bandwidth(array.nbytes / median(passes), array.nbytes / min(passes))


def _read(part: npt.NDArray[np.int32]) -> None:
    np.maximum.reduce(part)


def _array_bytes(megabytes: int) -> int:
    cache = cache_kb(3) or cache_kb(2) or 0
    wanted = max(megabytes << 20, _CACHES * cache << 10)
    rooms = (memory_mb().get("MemAvailable"), memory_limit_mb())
    return min([wanted, *(room << 18 for room in rooms if room)])  # a quarter, in bytes
