"""Our own kernels, compiled by numba for the processor at hand (`kernels`).

A token gets the same numbers alone, in a prompt, in a batch and among guesses. Keys and
values are kept in half precision, activations are rounded to 8 bits block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from struct import Struct
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.answer import Answer
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.deltas import Adapter, Delta
from edge_slm_runtime.engines.base import EngineOptions, Native
from edge_slm_runtime.engines.kv_cache import Array, KVCache, shared
from edge_slm_runtime.engines.low_rank import LowRank
from edge_slm_runtime.engines.stepping import Filled, SteppingEngine
from edge_slm_runtime.engines.thread_team import ThreadTeam
from edge_slm_runtime.engines.weights import Weights
from edge_slm_runtime.errors import EngineError, NotSupportedByEngine
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.compiled import has_vnni, kernels
from edge_slm_runtime.panels import LANES, UNIT
from edge_slm_runtime.sampling import Logits

_THREADS_MAX = 63
Tensor = NDArray[Any]


class NumbaEngine(SteppingEngine):
    name = "numba"
    install = "pip install 'edge-slm[numba]'"
    main_file = "model.safetensors"
    guesses = True
    adapts = True
    cache_dtype = np.float16
    cache_block = LANES
    process_mb = 48.0
    resident: ClassVar = {"int8": 1.0, "int4": 1.0}
    loads_table_twice = False  # the file is mapped

    def __init__(self, folder: Path, decoder: Decoder, options: EngineOptions) -> None:
        options = replace(options, threads=min(options.threads, _THREADS_MAX))
        self._weights = Weights(folder / self.main_file, decoder)
        self.team = ThreadTeam(
            options.threads, self._weights.table, decoder.traits, fewer=options.fewer_threads
        )
        self._buffers: list[Tensor] = []
        self._rows, self._ranks = 0, 0
        self._precision = options.precision
        super().__init__(Native(self.team), decoder, options)

    @classmethod
    def fast_here(cls) -> bool:
        return has_vnni()

    @classmethod
    def preload(cls, decoder: Decoder) -> None:
        kernels(decoder.traits)

    @classmethod
    def work_floats(cls, decoder: Decoder, rows: int, prefill: int, tokens: int) -> int:
        # Activations as floats and as bytes, of the residual and of the widest product.
        return prefill * (3 * decoder.width + decoder.layer_matrices()["up"][1])

    def adapted(self, delta: Delta) -> LowRank:
        self.native.get()
        equalised = self.decoder.norm == "rms" and self._precision == "int8"
        if equalised and self._weights.channels("layers.0.qkv") is None:
            raise NotSupportedByEngine(
                "this bundle was converted before adapters could be kept beside it",
                "convert it again",
            )
        return LowRank(delta, self._weights)

    def new_pass(
        self, cache: Array, width: int, kept: int, adapters: Sequence[Adapter | None] = ()
    ) -> _Pass:
        return self._pass(cache, [width] * cache.shape[1], kept, adapters)

    def _pass(
        self,
        cache: Array,
        widths: Sequence[int],
        kept: int,
        adapters: Sequence[Adapter | None] = (),
    ) -> _Pass:
        self.native.get()
        changes: list[LowRank | None] = [one.memory if one else None for one in adapters]
        ranks = max((change.rank for change in changes if change), default=0)
        self._make_room(sum(widths), ranks)
        return _Pass(self, cache, widths, kept, changes if ranks else (), ranks)

    def prefill(
        self, cache: KVCache, first: int, answers: Sequence[Answer]
    ) -> Iterator[list[Filled]]:
        """Several prompts at once, as long as they are short: weights are read once for all."""
        group: list[Answer] = []
        for answer in answers:
            if group and not self._fits(group, answer):
                yield from self._together(cache, first, group)
                first, group = first + len(group), []
            group.append(answer)
        yield from self._together(cache, first, group)

    def _fits(self, group: Sequence[Answer], answer: Answer) -> bool:
        """Not when most of its prompt could be copied from one of the group's, computed."""
        prompt, key = answer.plan.prompt, answer.plan.cache_key
        tokens = sum(len(one.plan.prompt) for one in group) + len(prompt)
        known = max(
            shared(one.plan.prompt, prompt) if one.plan.cache_key == key else 0 for one in group
        )
        return tokens <= self.prefill_tokens and 2 * known < len(prompt)

    def _together(
        self, cache: KVCache, first: int, group: Sequence[Answer]
    ) -> Iterator[list[Filled]]:
        if len(group) == 1:
            yield from super().prefill(cache, first, group)
            return
        prompts = [answer.plan.prompt for answer in group]
        rows = range(first, first + len(group))
        starts = [
            cache.begin(row, answer.plan.prompt, answer.plan.cache_key)
            for row, answer in zip(rows, group, strict=True)
        ]
        rest = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        one = self._pass(
            cache.array[:, first : rows.stop],
            [len(ids) for ids in rest],
            1,
            [answer.plan.adapter for answer in group],
        )
        logits = one.run(rest, starts)
        filled = []
        for row, answer, start, (scores,) in zip(rows, group, starts, logits, strict=True):
            cache.prompts[row], answer.cached = answer.plan.prompt, start
            filled.append(Filled(row, answer, scores))
        yield filled

    def close(self) -> None:
        if not self.native.forked:
            self.team.stop()
        super().close()

    def _make_room(self, rows: int, ranks: int) -> None:
        """Buffers for the activations of so many new tokens, and for adapters of such ranks."""
        if rows <= self._rows and ranks <= self._ranks:
            return
        rows, ranks = max(rows, self._rows), max(ranks, self._ranks)
        w, table = self._weights, self.team.table
        sizes = {
            t.RESIDUAL: (np.float32, rows * self.decoder.width),
            t.PRODUCT: (np.float32, rows * w.widest),
            t.GATED: (np.float32, rows * w.gated),
            t.ATTENDED: (np.float32, rows * w.attended),
            t.LEVELS: (np.int8, 2 * rows * w.inputs),
            t.SCALES: (np.float32, 2 * rows * w.blocks),
            t.SUMS: (np.int32, 2 * rows * w.blocks),
            t.SCORES: (np.float32, self.threads * t.QUERIES * int(w.table[t.POSITIONS])),
            t.LOW: (np.float32, rows * ranks),
        }
        with self.team.idle():
            if rows <= self._rows and ranks <= self._ranks:
                return
            fresh = {place: np.zeros(count, kind) for place, (kind, count) in sizes.items()}
            self._buffers += fresh.values()  # beside the old ones: this may be interrupted
            for place, buffer in fresh.items():
                table[place] = buffer.ctypes.data
            self._rows, self._ranks, self._buffers = rows, ranks, list(fresh.values())


class _Pass:
    def __init__(
        self,
        engine: NumbaEngine,
        cache: Array,
        widths: Sequence[int],
        kept: int,
        changes: Sequence[LowRank | None],
        ranks: int,
    ) -> None:
        """widths: new tokens of each row of `cache`. changes: adapters of these rows, or none at
        all; ranks: the largest of them."""
        decoder, answers = engine.decoder, len(widths)
        ends = list(accumulate(widths))
        padded = -(-decoder.vocab_size // UNIT) * UNIT
        self._native, self._widths = engine.native, widths
        self._held = cache, changes  # kept alive: the job holds bare addresses
        # What is new in every run is written at once: tokens, their positions, tokens before.
        self._given = np.zeros(2 * ends[-1] + answers, np.int64)
        self._write = Struct(f"{self._given.size}q").pack_into
        self._room = self._given.data
        self._wanted = np.array([i for end in ends for i in range(end - kept, end)], np.int64)
        self._parts = np.zeros((answers, t.PART), np.int64)
        self._parts[:, t.ROW] = range(answers)
        self._parts[:, t.FIRST] = [0, *ends[:-1]]
        self._parts[:, t.NEW], self._parts[:, t.KEPT] = widths, kept
        self._parts[:, t.FIRST_KEPT] = range(0, answers * kept, kept)
        addresses = [change.table.ctypes.data if change else 0 for change in changes]
        times = [*widths, *[kept] * answers] if changes else []
        self._changes = np.repeat(np.array(addresses * 2, np.int64), times)
        every = np.zeros((answers, kept, padded), np.float32)
        self.logits = every[..., : decoder.vocab_size]
        self._limits = decoder.vocab_size, decoder.positions
        given = self._given.ctypes.data
        self._job = np.zeros(t.PASS, np.int64)
        for place, value in (
            (t.TOKENS, ends[-1]),
            (t.LAST, answers * kept),
            (t.ANSWERS, answers),
            (t.IDS, given),
            (t.PLACES, given + 8 * ends[-1]),
            (t.STARTS, given + 16 * ends[-1]),
            (t.WANTED, self._wanted.ctypes.data),
            (t.PARTS, self._parts.ctypes.data),
            (t.CACHE, cache.ctypes.data),
            (t.CACHE_ROWS, cache.strides[0] // (cache.itemsize * cache[0, 0].size)),
            (t.LOGITS, every.ctypes.data),
            (t.CHANGES, self._changes.ctypes.data if changes else 0),
            (t.RANKS, ranks),
        ):
            self._job[place] = value
        self._address = self._job.ctypes.data

    def run(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Logits:
        tokens: list[int] = []
        places: list[int] = []
        for row, start, width in zip(ids, starts, self._widths, strict=True):
            tokens += row
            places += range(start, start + width)
        # The kernels check nothing: the memory that they read and write must be there.
        vocab_size, positions = self._limits
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise EngineError("a token id is not in the vocabulary")
        if not 0 <= min(places) <= max(places) < positions:
            raise EngineError("more tokens than the model has positions")
        self._write(self._room, 0, *tokens, *places, *starts)
        self._native.call(ThreadTeam.run, self._address, len(tokens))
        return self.logits
