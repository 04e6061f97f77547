"""ONNX Runtime: our own sampler steps the graph token by token.

The KV cache is one preallocated array; each layer's slice is bound as both past
and present, so GroupQueryAttention appends in place. Rows of a batch have their
own lengths (`seqlens_k`): each prompt is prefilled alone into its row, then all
rows decode together, and none sees another (fp32 and int8 get the same numbers as they
would alone; 4-bit kernels round a lone row otherwise). Of a prompt
that begins like an earlier one only the rest is computed (`kv_cache`).

Speculative decoding runs another graph of the same weights, one answer at a time: guessed
tokens (`ngrams`) are computed together with the last one, and kept as long as they are what
`Draft.choose` chooses from the logits before them. Every token is chosen from its own
logits, in order and with its own random number, so no guess changes an answer, be it
greedy or sampled. That graph rounds attention otherwise than the plain one, so quantised
answers may differ from those without `speculate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.bundle import MAIN_FILE, SPECULATIVE_FILE, ModelFacts
from edge_slm_runtime.draft import Draft, Step
from edge_slm_runtime.engines.base import Native, first_line
from edge_slm_runtime.engines.kv_cache import ALIGN, Array, KVCache, Shelf
from edge_slm_runtime.errors import EngineError, ManifestInvalid
from edge_slm_runtime.memory import PREFILL
from edge_slm_runtime.ngrams import ORDER, NGrams
from edge_slm_runtime.sampling import Logits, Sampling

_GUESSES = 3  # checked at once; more pay hardly more often


class OnnxEngine:
    """Honours everything: seeds, constraints, batching."""

    name = "onnxruntime"

    def __init__(
        self, folder: Path, facts: ModelFacts, threads: int, kept_bytes: int, speculate: bool
    ) -> None:
        """kept_bytes: of KV caches, for prompts that begin alike; 0 keeps none.
        speculate: guess tokens, if the variant has a graph that checks them.

        Raises EngineError when onnxruntime refuses the graph, ManifestInvalid when it
        is not the model of `facts`."""
        import onnxruntime as ort

        if hasattr(ort, "disable_telemetry_events"):
            ort.disable_telemetry_events()  # the app may have imported it before us
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.speculates = speculate and (folder / SPECULATIVE_FILE).is_file()
        file = SPECULATIVE_FILE if self.speculates else MAIN_FILE[self.name]
        try:
            session = ort.InferenceSession(
                str(folder / file), options, providers=["CPUExecutionProvider"]
            )
            inputs = {item.name: item for item in session.get_inputs()}
            self.layers = sum(name.endswith(".key") for name in inputs)
            _, heads, _, head_size = inputs["past_key_values.0.key"].shape
            outputs = {item.name: item for item in session.get_outputs()}
            self.vocab_size = int(outputs["logits"].shape[-1])
        except Exception as error:  # onnxruntime has one exception class per status code
            raise EngineError(
                f"onnxruntime cannot load {folder.name}: {first_line(error)}"
            ) from None
        found = (self.layers, int(heads), int(heads) * int(head_size), self.vocab_size)
        told = (facts.layers, facts.heads, facts.width, facts.vocab_size)
        if found != told:
            raise ManifestInvalid(
                f"{folder.name} has layers, heads, width, vocabulary {found}, "
                f"the manifest says {told}"
            )
        self.threads = threads
        self.native = Native(session)
        # The graph that checks guesses writes one position of no use behind the others.
        self._row_shape = (int(heads), facts.positions + self.speculates, int(head_size))
        self._shelf = Shelf((2 * self.layers, 1, *self._row_shape), kept_bytes)
        self._ngrams = NGrams() if self.speculates else None
        self._exact: bool | None = None  # see `_is_exact`

    def check(self, sampling: Sampling) -> None:
        self.native.get()

    def decode(self, drafts: Iterable[Draft], batch_size: int) -> Iterator[Step]:
        if batch_size > 1 and not self.speculates:
            yield from self._decode(iter(drafts), self._new_cache(batch_size))
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
        count, passes = 0, dict[int, _Pass]()  # of as many rows, by their new tokens
        while True:
            while len(rows) < len(cache.prompts) and (draft := next(waiting, None)):
                step = self._step(draft, self._prefill(cache, len(rows), draft))
                if not step.done:
                    rows.append(draft)
                yield from _handed_over(step, rows)
            if not rows:
                return
            guess = self._guess(rows[0]) if len(rows) == 1 else []
            if len(rows) != count:
                count = len(rows)
                passes.clear()
            width = 1 + len(guess)
            if width not in passes:
                passes[width] = _Pass(self, cache.array[:, :count], width, width)
            logits = passes[width].run(
                [[draft.ids[-1], *guess] for draft in rows],
                [len(draft.plan.prompt) + len(draft.ids) - 1 for draft in rows],
            )
            for draft, behind in zip(list(rows), logits, strict=True):
                for scores, expected in zip(behind, [*guess, None], strict=True):
                    yield from _handed_over(self._step(draft, scores), rows)
                    if draft.finish or draft.ids[-1] != expected:
                        break
                    draft.guessed += 1
            _close_gaps(rows, cache)

    def _step(self, draft: Draft, scores: Logits) -> Step:
        token = draft.choose(scores)
        if self._ngrams:
            self._ngrams.learn(_end(draft), token)
        return draft.accept(token)

    def _guess(self, draft: Draft) -> list[int]:
        if not self._ngrams:
            return []
        left = draft.plan.budget - len(draft.ids) - 1  # the last token needs no guess
        guess = self._ngrams.guess(_end(draft), min(_GUESSES, left))
        return guess if guess and self._is_exact() else []

    def _is_exact(self) -> bool:
        """Whether a token gets the same numbers however many are computed with it. That
        is up to the CPU's kernels, so it is looked at before the first guess is used."""
        if self._exact is None:
            ids = range(1 + _GUESSES)
            cache = self._new_cache(1).array
            alone = [row.copy() for row in self.logits(ids, cache)]
            self._exact = all(
                np.array_equal(
                    _Pass(self, cache, width, width).run([ids[-width:]], [len(ids) - width])[0],
                    alone[-width:],
                )
                for width in range(2, len(ids) + 1)
            )
        return self._exact

    def logits(self, ids: Sequence[int], cache: Array | None = None) -> Iterator[Logits]:
        """The prediction [V] behind each of `ids`, token by token as decoding goes: what
        fidelity is measured on. The array is reused. Raises as `decode`."""
        step = _Pass(self, self._new_cache(1).array if cache is None else cache, 1, 1)
        for position, token in enumerate(ids):
            yield step.run([[token]], [position])[0, 0]

    def close(self) -> None:
        self.native.close()
        self._shelf.clear()

    def _prefill(self, cache: KVCache, row: int, draft: Draft) -> Logits:
        """Computes the prompt in about equal parts; returns the logits [V] behind it."""
        prompt = draft.plan.prompt
        draft.cached = known = cache.begin(row, prompt)
        rest = len(prompt) - known
        parts = -(-rest // PREFILL)
        starts = [known + rest * i // parts // ALIGN * ALIGN for i in range(parts)]
        # Attention takes queries by twice the size of a head: no lone one shall be left over.
        if (len(prompt) - starts[-1]) % (2 * self._row_shape[2]) == 1:
            starts.append(len(prompt) - ALIGN - 1)
        for start, end in pairwise([*starts, len(prompt)]):
            part = _Pass(self, cache.array[:, row : row + 1], end - start, 1)
            logits: Logits = part.run([prompt[start:end]], [start])[0, 0]
        cache.prompts[row] = prompt
        if self._ngrams:
            self._ngrams.learn_all(prompt)
        return logits

    def _new_cache(self, rows: int) -> KVCache:
        return KVCache((2 * self.layers, rows, *self._row_shape))


class _Pass:
    """The graph bound to some rows of a cache, for `width` new tokens in each row and
    the logits behind the last `kept` of them."""

    def __init__(self, engine: OnnxEngine, cache: Array, width: int, kept: int) -> None:
        rows = cache.shape[1]
        self._native = engine.native
        self._binding = engine.native.get().io_binding()
        self._ids = np.zeros((rows, width), np.int64)
        self._positions = np.zeros((rows, width), np.int64)
        self._seqlens_k = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._keep = np.arange(-kept, 0)
        self._logits = np.zeros((rows, kept, engine.vocab_size), np.float32)
        self._cache = cache  # kept alive: the binding holds bare addresses
        self._bind("input", "input_ids", self._ids)
        self._bind("input", "position_ids", self._positions)
        self._bind("input", "seqlens_k", self._seqlens_k)
        self._bind("input", "total_sequence_length", self._total)
        if engine.speculates:
            self._bind("input", "keep", self._keep)
        self._bind("output", "logits", self._logits)
        for i in range(engine.layers):
            for part, half in zip(("key", "value"), cache[2 * i : 2 * i + 2], strict=True):
                self._bind("input", f"past_key_values.{i}.{part}", half)
                self._bind("output", f"present.{i}.{part}", half)

    def run(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Logits:
        """Logits [rows, kept, V] behind the last of the new tokens `ids` [rows, width],
        which stand at positions `starts` [rows] and on. The array is reused by the next run."""
        width = self._ids.shape[1]
        self._ids[:] = ids
        # No arithmetic of numpy: a step leaves the caches cold, and each call takes its time.
        for row, start in enumerate(starts):
            self._positions[row] = range(start, start + width)
            self._seqlens_k[row] = start + width - 1
        self._total[()] = max(starts) + width
        session = self._native.get()
        try:
            session.run_with_iobinding(self._binding)
        except Exception as error:
            raise EngineError(f"onnxruntime failed: {first_line(error)}") from error
        return self._logits

    def _bind(self, way: str, name: str, array: NDArray[Any]) -> None:
        bind = self._binding.bind_input if way == "input" else self._binding.bind_output
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _end(draft: Draft) -> tuple[int, ...]:
    """The last tokens so far: what n-grams look at."""
    return (*draft.plan.prompt[-ORDER:], *draft.ids[-ORDER:])[-ORDER:]


def _handed_over(step: Step, rows: Sequence[Draft]) -> Iterator[Step]:
    """Yields `step`; what the reader does with it is not the rows' time."""
    left = perf_counter()
    yield step
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
