"""Keys and values of answers being written, kept for prompts that begin alike.

If a prompt begins with the tokens of an earlier one, their keys and values are reused and
only the rest is computed: a request under another command or seed, the
candidates of one request, the fixed preamble of an app. Only the
caches of earlier answers are stored for this, and their memory is bounded.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.errors import OutOfMemory

# [2 × layers, rows, heads, positions, head size]; a layer's keys come before its values.
Shape = tuple[int, int, int, int, int]
Array = NDArray[Any]  # of float32 or float16
_LEAST = 4  # tokens in common that are worth a copy; every prompt begins with the same one
# Kernels of matrix products take rows in pairs, and a lone one otherwise: a prompt that is
# cut at multiples of it, two tokens or more left, gets the same bits as a whole one.
ALIGN = 2


class KVCache:
    """prompts: per row, the tokens whose keys and values stand at its first positions.
    keys: per row, of the callers who share it. written: positions whose memory may be in use.
    block: positions whose keys lie together, and are copied together."""

    def __init__(self, shape: Shape, dtype: Any, block: int = 1) -> None:
        """Raises OutOfMemory when there is no memory for it."""
        self.array = _pages(shape, np.dtype(dtype))
        self.prompts: list[tuple[int, ...]] = [()] * shape[1]
        self.keys = [""] * shape[1]
        self.written, self._block = 0, block

    def known(self, row: int, prompt: Sequence[int], key: str) -> int:
        """Tokens of `prompt` that `row` holds for callers of `key`."""
        return shared(self.prompts[row], prompt) if self.keys[row] == key else 0

    def begin(self, row: int, prompt: Sequence[int], key: str = "") -> int:
        """Brings as much of `prompt` into `row` as any row of the same `key` still holds, to a
        multiple of ALIGN, except its last tokens, which are to be computed. Returns how many
        that is."""
        rows = (row, *range(len(self.prompts)))  # the first of equals is taken
        source = max(rows, key=lambda r: self.known(r, prompt, key))
        known = max(0, min(self.known(source, prompt, key), len(prompt) - ALIGN))
        self.copy(row, self, source, known // ALIGN * ALIGN)
        self.keys[row] = key
        return len(self.prompts[row])

    def copy(self, row: int, source: KVCache, source_row: int, positions: int) -> None:
        """Makes the first `positions` of `row` those of another row."""
        if source is not self or source_row != row:
            end = -(-positions // self._block) * self._block
            self.array[:, row, :, :end] = source.array[:, source_row, :, :end]
            self.keys[row] = source.keys[source_row]
        self.prompts[row] = source.prompts[source_row][:positions]


class PrefixCache:
    """Caches of single answers between their uses. May be used from several threads.

    When their written positions take more than `limit` bytes, the least recently used are
    freed, except the last; a `limit` of 0 keeps none.

    There is no lock: the garbage collector or a signal handler may give a cache back at any
    point of any method, and would wait for a lock of its own thread for ever. Each change of
    the list is a single operation of it, which nothing interrupts.
    """

    def __init__(self, shape: Shape, limit: int, dtype: Any, block: int = 1) -> None:
        """`shape` has one row."""
        self._shape, self._limit, self._dtype = shape, limit, np.dtype(dtype)
        self._new = partial(KVCache, shape, dtype, block)
        self._kept: list[KVCache] = []  # last used, last

    @property
    def bytes(self) -> int:
        """Memory of the kept caches."""
        return sum(self._bytes(cache.written) for cache in tuple(self._kept))

    def _bytes(self, positions: int) -> int:
        """Whole pages of memory: positions of a head lie together, heads apart."""
        layers, rows, heads, _, size = self._shape
        pages = -(-positions * size * self._dtype.itemsize // mmap.PAGESIZE)
        return int(layers * rows * heads * pages * mmap.PAGESIZE)

    def checkout(self, prompt: Sequence[int], key: str = "") -> KVCache:
        """A cache for an answer to `prompt`; `begin` finds the part of it that is cached, by
        callers of the same `key`.

        Raises OutOfMemory when there is no memory for another one.
        """
        best = self._take(prompt, key)
        if best is None:
            return self._new()
        known = best.known(0, prompt, key)
        full = self.bytes + self._bytes(best.written + len(prompt)) > self._limit
        if full or 2 * known >= len(best.prompts[0]):
            return best
        try:
            fresh = self._new()
            fresh.copy(0, best, 0, known)
        finally:
            self._kept.append(best)  # used last
        return fresh

    def _take(self, prompt: Sequence[int], key: str) -> KVCache | None:
        """Removes the kept cache that knows most of `prompt`."""
        while best := max(
            tuple(self._kept), key=lambda cache: cache.known(0, prompt, key), default=None
        ):
            with suppress(ValueError):  # another caller has just taken it
                self._kept.remove(best)
                return best
        return None

    def checkin(self, cache: KVCache, positions: int) -> None:
        """Keeps a cache in which an answer has come to `positions`."""
        cache.written = max(cache.written, positions)
        self._kept.append(cache)
        while self.bytes > self._limit and len(self._kept) > min(self._limit, 1):
            del self._kept[:1]

    def clear(self) -> None:
        self._kept.clear()


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two prompts begin with alike; 0 when it is too few to matter."""
    length = min(len(a), len(b))
    count = next((i for i in range(length) if a[i] != b[i]), length)
    return count if count >= _LEAST else 0


def _pages(shape: Shape, dtype: np.dtype[Any]) -> Array:
    """An array whose memory is taken page by page, as its positions are written.

    numpy asks for huge pages, with which a short answer takes the memory of a long one.
    """
    size = prod(shape) * dtype.itemsize
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            pages = mmap.mmap(-1, size)
    except (OSError, OverflowError, ValueError, MemoryError):
        raise OutOfMemory(
            f"no memory for the cache of {shape[1]} answers of {shape[3]} positions",
            "choose a smaller batch_size",
        ) from None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)
