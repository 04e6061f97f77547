"""Engines whose tokens our own sampler chooses, step by step.

The KV cache is one preallocated array that every pass of the model writes to in place. Rows
of a batch have their own lengths: prompts are prefilled into their rows, then all rows
decode together, and none sees another. Of a prompt that begins like an earlier one only the
rest is computed (`kv_cache`).

Speculative decoding works on one answer at a time: guessed tokens (`ngrams`) are computed
together with the last one, and kept as long as they are what `Draft.choose` chooses from the
logits before them. Every token is chosen from its own logits, in order and with its own
random number, so no guess changes an answer, be it greedy or sampled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from edge_slm_runtime.bundle import ModelFacts
from edge_slm_runtime.draft import Draft, Step
from edge_slm_runtime.engines.base import Native
from edge_slm_runtime.engines.kv_cache import ALIGN, Array, KVCache, Shelf
from edge_slm_runtime.memory import PREFILL
from edge_slm_runtime.ngrams import ORDER, NGrams
from edge_slm_runtime.sampling import Logits, Sampling

GUESSES = 3  # checked at once; more pay hardly more often


class Pass(Protocol):
    """The model bound to some rows of a cache, for S new tokens in each row and the logits
    [rows, K, V] behind the last K of them."""

    @property
    def logits(self) -> Logits:
        """Those of the last run."""

    def run(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Logits:
        """`logits`, of the new tokens `ids` [rows, S] at positions `starts` [rows] and on.

        Raises UsedAfterFork, EngineError."""


class SteppingEngine(ABC):
    """Honours everything: seeds, constraints, batching."""

    name: str
    cache_dtype: Any = np.float32
    prefill_tokens = PREFILL  # of a prompt, computed at once

    def __init__(
        self,
        native: Native,
        facts: ModelFacts,
        threads: int,
        kept_bytes: int,
        speculates: bool = False,
    ) -> None:
        """native: what is closed at the end. kept_bytes: of KV caches, for prompts that begin
        alike; 0 keeps none. speculates: guess tokens; only for kernels that give a token the
        same numbers however many are computed with it."""
        self.native, self.threads, self.speculates = native, threads, speculates
        self.layers, self.vocab_size = facts.layers, facts.vocab_size
        size = facts.width // facts.heads
        self.row_shape = (facts.heads, facts.positions, size)
        self._shelf = Shelf((2 * self.layers, 1, *self.row_shape), kept_bytes, self.cache_dtype)
        self._ngrams = NGrams() if speculates else None

    @abstractmethod
    def new_pass(self, cache: Array, width: int, kept: int) -> Pass:
        """For the rows of `cache` [2 · layers, rows, heads, positions, head size], `width` new
        tokens in each, and the logits behind the last `kept`."""

    def check(self, sampling: Sampling) -> None:
        self.native.get()

    def decode(self, drafts: Iterable[Draft], batch_size: int) -> Iterator[Step]:
        if batch_size > 1 and not self.speculates:
            yield from self._decode(iter(drafts), self.new_cache(batch_size))
            return
        for draft in drafts:
            self.native.get()  # a forked child must not wait for the shelf
            cache = self._shelf.lend(draft.plan.prompt)
            try:
                yield from self._decode(iter([draft]), cache)
            finally:
                if not self.native.forked and not self.native.closed:
                    self._shelf.take_back(cache, len(draft.plan.prompt) + len(draft.ids))

    def _decode(self, waiting: Iterator[Draft], cache: KVCache) -> Iterator[Step]:
        """As many drafts at a time as `cache` has rows."""
        rows: list[Draft] = []  # draft i lives in row i of the cache
        # Of as many rows, by their new tokens, each with its logits row by row: a step leaves
        # the processor's caches cold, so every object that is not made in it counts.
        count, passes = 0, dict[int, tuple[Pass, list[list[Logits]]]]()
        while True:
            while fresh := list(islice(waiting, len(cache.prompts) - len(rows))):
                for draft, scores in zip(fresh, self.prefill(cache, len(rows), fresh), strict=True):
                    rows.append(draft)
                    step = self._step(draft, scores)
                    left = perf_counter()
                    yield step
                    _away(rows, left)
                _close_gaps(rows, cache)
            if not rows:
                return
            guess = self._guess(rows[0]) if self._ngrams and len(rows) == 1 else []
            if len(rows) != count:
                count = len(rows)
                passes.clear()
            width = 1 + len(guess)
            if width not in passes:
                one = self.new_pass(cache.array[:, :count], width, width)
                passes[width] = one, [list(behind) for behind in one.logits]
            one, logits = passes[width]
            one.run(
                [[draft.ids[-1], *guess] for draft in rows],
                [len(draft.plan.prompt) + len(draft.ids) - 1 for draft in rows],
            )
            finished = False
            for draft, behind in zip(rows, logits, strict=True):
                for scores, expected in zip(behind, (*guess, None), strict=True):
                    step = self._step(draft, scores)
                    left = perf_counter()
                    yield step
                    _away(rows, left)
                    if step.done or draft.ids[-1] != expected:
                        finished |= step.done
                        break
                    draft.guessed += 1
            if finished:
                _close_gaps(rows, cache)

    def _step(self, draft: Draft, scores: Logits) -> Step:
        token = draft.choose(scores)
        if self._ngrams:
            self._ngrams.learn(_end(draft), token)
        return draft.accept(token)

    def _guess(self, draft: Draft) -> list[int]:
        assert self._ngrams
        left = draft.plan.budget - len(draft.ids) - 1  # the last token needs no guess
        return self._ngrams.guess(_end(draft), min(GUESSES, left))

    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The prediction [V] behind each of `ids`, token by token as decoding goes: what
        fidelity is measured on. The array is reused. Raises as `decode`."""
        step = self.new_pass(self.new_cache(1).array, 1, 1)
        for position, token in enumerate(ids):
            yield step.run([[token]], [position])[0, 0]

    def close(self) -> None:
        self.native.close()
        self._shelf.clear()

    def prefill(self, cache: KVCache, first: int, drafts: Sequence[Draft]) -> Iterator[Logits]:
        """Computes the prompts into the rows `first` and on of `cache`; the logits [V] behind
        each, to be used before the next one is asked for."""
        for row, draft in enumerate(drafts, first):
            yield self._prefill(cache, row, draft)
            if self._ngrams:
                self._ngrams.learn_all(draft.plan.prompt)

    def _prefill(self, cache: KVCache, row: int, draft: Draft) -> Logits:
        """Computes the prompt in about equal parts; returns the logits [V] behind it."""
        prompt = draft.plan.prompt
        draft.cached = known = cache.begin(row, prompt)
        rest = len(prompt) - known
        parts = -(-rest // self.prefill_tokens)
        starts = [known + rest * i // parts // ALIGN * ALIGN for i in range(parts)]
        # Attention takes queries by twice the size of a head: no lone one shall be left over.
        if (len(prompt) - starts[-1]) % (2 * self.row_shape[2]) == 1:
            starts.append(len(prompt) - ALIGN - 1)
        for start, end in pairwise([*starts, len(prompt)]):
            part = self.new_pass(cache.array[:, row : row + 1], end - start, 1)
            logits: Logits = part.run([prompt[start:end]], [start])[0, 0]
        cache.prompts[row] = prompt
        return logits

    def new_cache(self, rows: int) -> KVCache:
        return KVCache((2 * self.layers, rows, *self.row_shape), self.cache_dtype)


def _end(draft: Draft) -> tuple[int, ...]:
    """The last tokens so far: what n-grams look at."""
    return (*draft.plan.prompt[-ORDER:], *draft.ids[-ORDER:])[-ORDER:]


def _away(rows: Sequence[Draft], left: float) -> None:
    """What the reader did with a step since `left` is not the rows' time."""
    away = perf_counter() - left
    for draft in rows:
        draft.away += away


def _close_gaps(rows: list[Draft], cache: KVCache) -> None:
    """Moves the last drafts into the rows of finished ones: active rows stay in front."""
    for row in reversed(range(len(rows))):
        if rows[row].finish:
            last = rows.pop()
            if row < len(rows):
                cache.copy(row, cache, len(rows), len(last.plan.prompt) + len(last.ids))
                rows[row] = last
