"""Our own kernels, compiled by numba for the processor at hand (`kernels`).

A token gets the same numbers alone, in a prompt, in a batch and among guesses. Keys and
values are kept in half precision, activations are rounded to 8 bits block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.bundle import MAIN_FILE, ModelFacts
from edge_slm_runtime.engines.base import Native
from edge_slm_runtime.engines.crew import Crew
from edge_slm_runtime.engines.kv_cache import Array
from edge_slm_runtime.engines.stepping import SteppingEngine
from edge_slm_runtime.engines.weights import Weights
from edge_slm_runtime.kernels import tables as t
from edge_slm_runtime.panels import UNIT
from edge_slm_runtime.sampling import Logits

_THREADS_MAX = 63
Tensor = NDArray[Any]


class JitEngine(SteppingEngine):
    name = "numba"
    cache_dtype = np.float16

    def __init__(
        self, folder: Path, facts: ModelFacts, threads: int, kept_bytes: int, speculate: bool
    ) -> None:
        """kept_bytes, speculate: see `SteppingEngine`.

        Raises ImportError without llvmlite and numba, EngineError when the weights cannot be
        read, ManifestInvalid when they are not the model of `facts`."""
        threads = min(threads, _THREADS_MAX)
        self._weights = Weights(folder / MAIN_FILE[self.name], facts)
        self.crew = Crew(threads)
        self.crew.table[t.MODEL] = self._weights.table.ctypes.data
        self.facts = facts
        self._buffers: list[Tensor] = []
        self._rows = 0
        super().__init__(Native(self.crew), facts, threads, kept_bytes, speculate)

    def new_pass(self, cache: Array, width: int, kept: int) -> _Pass:
        self.native.get()
        self.make_room(cache.shape[1] * width)
        return _Pass(self, cache, width, kept)

    def close(self) -> None:
        if not self.native.forked:
            self.crew.stop()
        super().close()

    def make_room(self, rows: int) -> None:
        """Buffers for the activations of so many new tokens."""
        if rows <= self._rows:
            return
        w, table = self._weights, self.crew.table
        sizes = {
            t.X: (np.float32, rows * w.width),
            t.WIDE: (np.float32, rows * w.widest),
            t.ATTENDED: (np.float32, rows * w.width),
            t.LEVELS: (np.int8, rows * w.inputs),
            t.STEPS: (np.float32, rows * w.blocks),
            t.SUMS: (np.int32, rows * w.blocks),
            t.SCORES: (np.float32, self.threads * self.facts.positions),
        }
        with self.crew.idle():
            self._buffers = []
            for place, (kind, count) in sizes.items():
                buffer = np.zeros(count, kind)
                self._buffers.append(buffer)
                table[place] = buffer.ctypes.data
            self._rows = rows


class _Pass:
    def __init__(self, engine: JitEngine, cache: Array, width: int, kept: int) -> None:
        rows = cache.shape[1]
        facts = engine.facts
        padded = -(-facts.vocab_size // UNIT) * UNIT
        self._native = engine.native
        self._cache = cache  # kept alive: the job holds bare addresses
        self._ids = np.zeros((rows, width), np.int64)
        self._starts = np.zeros(rows, np.int64)
        self._padded = np.zeros((rows, kept, padded), np.float32)
        self._logits = self._padded[..., : facts.vocab_size]
        self._job = np.zeros(t.PASS, np.int64)
        self._job[t.ANSWERS], self._job[t.NEW], self._job[t.KEPT] = rows, width, kept
        self._job[t.IDS] = self._ids.ctypes.data
        self._job[t.STARTS] = self._starts.ctypes.data
        self._job[t.CACHE] = cache.ctypes.data
        self._job[t.CACHE_ROWS] = cache.strides[0] // (cache.itemsize * cache[0, 0].size)
        self._job[t.LOGITS] = self._padded.ctypes.data
        self._address = self._job.ctypes.data

    def run(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Logits:
        crew: Crew = self._native.get()
        self._ids[:] = ids
        self._starts[:] = starts
        crew.run(self._address)
        return self._logits
