"""Engines whose tokens our own sampler chooses, step by step.

The KV cache is one preallocated array that every pass of the model writes to in place. Rows
of a batch have their own lengths: prompts are prefilled into their rows, then all rows
decode together, independently of each other. A pass of prompts and one of the answers under
way take turns, so a long prompt, which takes several passes, holds nobody up. Of a prompt that
begins like an earlier one only the rest is computed (`kv_cache`).

Speculative decoding works on one answer at a time: guessed tokens (`ngrams`) are computed
together with the last one, and kept as long as they are what `Answer.choose` chooses from the
logits before them. Every token is chosen from its own logits, in order and with its own
random number, so no guess changes an answer, be it greedy or sampled.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from time import perf_counter
from typing import NamedTuple, Protocol

from edge_slm_runtime.answer import Answer, Step
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.deltas import Adapter
from edge_slm_runtime.engines.base import Engine, EngineOptions, Native
from edge_slm_runtime.engines.kv_cache import ALIGN, Array, KVCache, PrefixCache
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


class Filled(NamedTuple):
    """An answer whose prompt is in a row of the cache, and the logits [V] after it; None: a
    part of the prompt is."""

    row: int
    answer: Answer
    scores: Logits | None


class SteppingEngine(Engine):
    """Honours everything: seeds, constraints, batching."""

    def __init__(self, native: Native, decoder: Decoder, options: EngineOptions) -> None:
        """native: the model, closed at the end. Tokens are guessed only by classes whose kernels
        give a token the same numbers however many are computed with it (`guesses`)."""
        self.native, self.decoder, self.threads = native, decoder, options.threads
        self.prefill_tokens = options.prefill_tokens
        self.speculates = options.speculate and self.guesses
        self._prefixes = PrefixCache(
            decoder.cache_shape(1, self.cache_block),
            options.cache_bytes,
            self.cache_dtype,
            self.cache_block,
        )
        self._ngrams = NGrams() if self.speculates else None

    @abstractmethod
    def new_pass(
        self, cache: Array, width: int, kept: int, adapters: Sequence[Adapter | None] = ()
    ) -> Pass:
        """For the rows of `cache` (`Decoder.cache_shape`), `width` new tokens in
        each, and the logits after the last `kept`. adapters: of each row; () is none."""

    def check(self, sampling: Sampling) -> None:
        self.native.get()

    def decode(self, answers: Iterable[Answer], batch_size: int) -> Iterator[Step]:
        if batch_size > 1 and not self.speculates:
            yield from self._decode(iter(answers), self.new_cache(batch_size))
            return
        for answer in answers:
            self.native.get()  # a forked child must not wait for the prefix_cache
            cache = self._prefixes.checkout(answer.plan.prompt, answer.plan.cache_key)
            try:
                yield from self._decode(iter([answer]), cache)
            finally:
                if not self.native.forked and not self.native.closed:
                    self._prefixes.checkin(cache, len(answer.plan.prompt) + len(answer.ids))

    def _decode(self, waiting: Iterator[Answer], cache: KVCache) -> Iterator[Step]:
        """As many answers at a time as `cache` has rows. `waiting` may come to an end and have
        more later: it is asked before every pass with a row free, until none is under way."""
        rows: list[Answer] = []  # answer i lives in row i of the cache
        prompts: Iterator[list[Filled]] = iter(())  # what is left of those drawn last
        # Of rows with these adapters, by their new tokens, each with its logits row by row: a step
        # leaves the processor's caches cold, so every object that is not made in it counts.
        adapters: list[Adapter | None] = []
        passes = dict[int, tuple[Pass, list[list[Logits]]]]()
        while True:
            filled = next(prompts, None)
            if filled is None and (fresh := list(islice(waiting, len(cache.prompts) - len(rows)))):
                prompts = self.prefill(cache, len(rows), fresh)
                filled = next(prompts)
            if filled:
                yield from self._begin(rows, cache, filled)
                if not rows:
                    continue
            elif not rows:
                return
            guess = self._guess(rows[0]) if self._ngrams and len(rows) == 1 else []
            if (now := [answer.plan.adapter for answer in rows]) != adapters:
                adapters = now
                passes.clear()
            width = 1 + len(guess)
            if width not in passes:
                one = self.new_pass(cache.array[:, : len(rows)], width, width, adapters)
                passes[width] = one, [list(behind) for behind in one.logits]
            one, logits = passes[width]
            one.run(
                [[answer.ids[-1], *guess] for answer in rows],
                [len(answer.plan.prompt) + len(answer.ids) - 1 for answer in rows],
            )
            finished = False
            for answer, behind in zip(rows, logits, strict=True):
                for scores, expected in zip(behind, (*guess, None), strict=True):
                    count_before = len(answer.ids)
                    step = self._step(answer, scores)
                    left = perf_counter()
                    yield step
                    _exclude_reader_time(rows, left)
                    taken_back = len(answer.ids) <= count_before
                    if step.done or taken_back or answer.ids[-1] != expected:
                        finished |= step.done
                        break
                    answer.guessed += 1
            if finished:
                _close_gaps(rows, cache)

    def _begin(
        self, rows: list[Answer], cache: KVCache, filled: Sequence[Filled]
    ) -> Iterator[Step]:
        """Adds those to `rows` whose prompts are complete, each with its first token."""
        for row, answer, scores in filled:
            if scores is None:
                step = answer.end() if answer.called_off else Step(answer, "", done=False)
            else:
                if row != len(rows):  # others have ended meanwhile
                    cache.copy(len(rows), cache, row, len(answer.plan.prompt))
                rows.append(answer)
                step = self._step(answer, scores)
            left = perf_counter()
            yield step
            _exclude_reader_time(rows, left)
        _close_gaps(rows, cache)

    def _step(self, answer: Answer, scores: Logits) -> Step:
        token = answer.choose(scores)
        if self._ngrams:
            self._ngrams.learn(_end(answer), token)
        return answer.accept(token)

    def _guess(self, answer: Answer) -> list[int]:
        assert self._ngrams
        left = answer.plan.budget - len(answer.ids) - 1  # the last token needs no guess
        return self._ngrams.guess(_end(answer), min(GUESSES, left))

    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        step = self.new_pass(self.new_cache(1).array, 1, 1)
        for position, token in enumerate(ids):
            yield step.run([[token]], [position])[0, 0]

    def trim_memory(self) -> None:
        if not self.native.forked:
            self._prefixes.clear()

    def close(self) -> None:
        self.native.close()
        self._prefixes.clear()

    def prefill(
        self, cache: KVCache, first: int, answers: Sequence[Answer]
    ) -> Iterator[list[Filled]]:
        """Computes the prompts into the rows of `cache` from `first` on. An item is what one
        pass did; its logits are valid until the next."""
        for row, answer in enumerate(answers, first):
            yield from self._prefill(cache, row, answer)
            if self._ngrams:
                self._ngrams.learn_all(answer.plan.prompt)

    def _prefill(self, cache: KVCache, row: int, answer: Answer) -> Iterator[list[Filled]]:
        """Computes the prompt in about equal parts."""
        prompt = answer.plan.prompt
        answer.cached = known = cache.begin(row, prompt, answer.plan.cache_key)
        rest = len(prompt) - known
        parts = -(-rest // self.prefill_tokens)
        starts = [known + rest * i // parts // ALIGN * ALIGN for i in range(parts)]
        # onnxruntime's attention takes queries in groups of twice the size of a head: leave no
        # group with a single query, which it would round differently.
        last = len(prompt) - starts[-1]
        if last > 1 and last % (2 * self.decoder.head_width) == 1:
            starts.append(len(prompt) - ALIGN - 1)
        for start, end in pairwise([*starts, len(prompt)]):
            array, adapters = cache.array[:, row : row + 1], [answer.plan.adapter]
            part = self.new_pass(array, end - start, 1, adapters)
            scores = part.run([prompt[start:end]], [start])[0, 0]
            if end < len(prompt):
                yield [Filled(row, answer, None)]
                if answer.finish:
                    return
        cache.prompts[row] = prompt
        yield [Filled(row, answer, scores)]

    def new_cache(self, rows: int) -> KVCache:
        shape = self.decoder.cache_shape(rows, self.cache_block)
        return KVCache(shape, self.cache_dtype, self.cache_block)


def _end(answer: Answer) -> tuple[int, ...]:
    """The last tokens so far, as context of the n-grams."""
    return (*answer.plan.prompt[-ORDER:], *answer.ids[-ORDER:])[-ORDER:]


def _exclude_reader_time(rows: Sequence[Answer], left: float) -> None:
    """Leaves the time since `left`, in which the reader had a step, out of the rows' timings."""
    away = perf_counter() - left
    for answer in rows:
        if answer.can_wait:
            answer.away += away


def _close_gaps(rows: list[Answer], cache: KVCache) -> None:
    """Moves the last answers into the rows of finished ones: active rows stay in front."""
    for row in reversed(range(len(rows))):
        if rows[row].finish:
            last = rows.pop()
            if row < len(rows):
                cache.copy(row, cache, len(rows), len(last.plan.prompt) + len(last.ids))
                rows[row] = last
