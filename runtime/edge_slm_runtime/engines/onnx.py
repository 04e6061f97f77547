"""ONNX Runtime: our own sampler steps the graph token by token.

The KV cache is one preallocated array; each layer's slice is bound as both past
and present, so GroupQueryAttention appends in place. Rows of a batch have their
own lengths (`seqlens_k`): each prompt is prefilled alone into its slot, then all
rows decode together, so a row gets the same numbers as it would alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.bundle import ModelFacts
from edge_slm_runtime.draft import Draft, Step
from edge_slm_runtime.engines.base import Native, first_line
from edge_slm_runtime.errors import EngineError, ManifestInvalid
from edge_slm_runtime.sampling import Logits, Sampling

Cache = NDArray[np.float32]  # [2 × layers, rows, heads, positions, head size]


class OnnxEngine:
    """Honours everything: seeds, constraints, batching."""

    name = "onnxruntime"

    def __init__(self, folder: Path, facts: ModelFacts, threads: int) -> None:
        """Raises EngineError when onnxruntime refuses the graph, ManifestInvalid when it
        is not the model of `facts`."""
        import onnxruntime as ort

        if hasattr(ort, "disable_telemetry_events"):
            ort.disable_telemetry_events()  # the app may have imported it before us
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(
                str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
            inputs = {item.name: item for item in session.get_inputs()}
            self.layers = sum(name.endswith(".key") for name in inputs)
            _, heads, _, head_size = inputs["past_key_values.0.key"].shape
            outputs = {item.name: item for item in session.get_outputs()}
            self.vocab_size = int(outputs["logits"].shape[-1])
            self._row_shape = (int(heads), facts.positions, int(head_size))
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
        self._spare: list[Cache] = []  # at most one, for the next single answer

    def check(self, sampling: Sampling) -> None:
        self.native.get()

    def decode(self, drafts: Iterable[Draft], batch_size: int) -> Iterator[Step]:
        waiting = iter(drafts)
        rows: list[Draft] = []  # row i lives in slot i of the cache
        steps: dict[int, _Pass] = {}
        cache = self._lend(batch_size)
        try:
            while True:
                while len(rows) < batch_size and (draft := next(waiting, None)):
                    step = draft.accept(draft.choose(self._prefill(cache, len(rows), draft)))
                    if not step.done:
                        rows.append(draft)
                    yield from _handed_over(step, rows)
                if not rows:
                    return
                size = len(rows)
                if size not in steps:
                    steps[size] = _Pass(self, cache[:, :size], width=1)
                logits = steps[size].run(
                    [draft.ids[-1:] for draft in rows],
                    [len(draft.plan.prompt) + len(draft.ids) - 1 for draft in rows],
                )
                for draft, scores in zip(list(rows), logits, strict=True):
                    yield from _handed_over(draft.accept(draft.choose(scores)), rows)
                _close_gaps(rows, cache)
        finally:
            if batch_size == 1 and not self.native.closed:
                self._spare = [cache]

    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The prediction [V] behind each of `ids`, token by token as decoding goes: what
        fidelity is measured on. The array is reused. Raises as `decode`."""
        step = _Pass(self, self._lend(1), width=1)
        for position, token in enumerate(ids):
            yield step.run([[token]], [position])[0]

    def close(self) -> None:
        self.native.close()
        self._spare = []

    def _prefill(self, cache: Cache, slot: int, draft: Draft) -> Logits:
        prompt = draft.plan.prompt
        ready = _Pass(self, cache[:, slot : slot + 1], width=len(prompt))
        logits: Logits = ready.run([prompt], [0])[0]
        return logits

    def _lend(self, rows: int) -> Cache:
        """A cache for `rows` answers. Untouched pages of a new one cost no memory."""
        if rows == 1:
            with suppress(IndexError):  # another thread may have it
                return self._spare.pop()
        heads, positions, head_size = self._row_shape
        shape = (2 * self.layers, rows, heads, positions, head_size)
        try:
            return np.empty(shape, np.float32)
        except (MemoryError, ValueError):  # ValueError: more than there are addresses
            raise EngineError(
                f"no memory for the cache of {rows} answers of {positions} positions",
                "choose a smaller batch_size",
            ) from None


class _Pass:
    """The graph bound to some rows of a cache, for `width` new tokens in each row."""

    def __init__(self, engine: OnnxEngine, cache: Cache, width: int) -> None:
        rows = cache.shape[1]
        self._native = engine.native
        self._binding = engine.native.get().io_binding()
        self._ids = np.zeros((rows, width), np.int64)
        self._positions = np.zeros((rows, width), np.int64)
        self._seqlens_k = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits = np.zeros((rows, 1, engine.vocab_size), np.float32)
        self._cache = cache  # kept alive: the binding holds bare addresses
        self._bind("input", "input_ids", self._ids)
        self._bind("input", "position_ids", self._positions)
        self._bind("input", "seqlens_k", self._seqlens_k)
        self._bind("input", "total_sequence_length", self._total)
        self._bind("output", "logits", self._logits)
        for i in range(engine.layers):
            for part, half in zip(("key", "value"), cache[2 * i : 2 * i + 2], strict=True):
                self._bind("input", f"past_key_values.{i}.{part}", half)
                self._bind("output", f"present.{i}.{part}", half)

    def run(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Logits:
        """Logits [rows, V] behind the new tokens `ids` [rows, width], which stand
        at positions `starts` [rows] and on. The array is reused by the next run."""
        width = self._ids.shape[1]
        self._ids[:] = ids
        self._positions[:] = np.asarray(starts)[:, None] + np.arange(width)
        self._seqlens_k[:] = np.asarray(starts) + width - 1
        self._total[()] = self._seqlens_k.max() + 1
        session = self._native.get()
        try:
            session.run_with_iobinding(self._binding)
        except Exception as error:
            raise EngineError(f"onnxruntime failed: {first_line(error)}") from error
        return self._logits[:, 0]

    def _bind(self, way: str, name: str, array: NDArray[Any]) -> None:
        bind = self._binding.bind_input if way == "input" else self._binding.bind_output
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _handed_over(step: Step, rows: Sequence[Draft]) -> Iterator[Step]:
    """Yields `step`; what the reader does with it is not the rows' time."""
    left = perf_counter()
    yield step
    away = perf_counter() - left
    for draft in rows:
        draft.away += away


def _close_gaps(rows: list[Draft], cache: Cache) -> None:
    """Moves the last rows into the slots of finished ones: active rows stay in front."""
    for slot in reversed(range(len(rows))):
        if rows[slot].finish:
            last = rows.pop()
            if slot < len(rows):
                used = len(last.plan.prompt) + len(last.ids)
                cache[:, slot, :, :used] = cache[:, len(rows), :, :used]
                rows[slot] = last
