"""The SDK's one object: a loaded bundle that answers requests."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from time import perf_counter
from types import TracebackType
from typing import Any
from weakref import ref

import numpy as np

from edge_slm_runtime.answer import Answer, Step
from edge_slm_runtime.bound import Bound
from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.closable import Closable
from edge_slm_runtime.command import Command, CommandSchema, count_words, is_count
from edge_slm_runtime.confidence import answer_to
from edge_slm_runtime.deadline import Fit, fit
from edge_slm_runtime.deltas import Adapter, Delta
from edge_slm_runtime.description import model_facts
from edge_slm_runtime.engines.base import Engine, ended_at_exit
from edge_slm_runtime.errors import (
    BadSetting,
    EdgeSlmError,
    OutOfMemory,
    shown,
)
from edge_slm_runtime.length import tolerance
from edge_slm_runtime.memory import memory_errors, peak_rss_mb
from edge_slm_runtime.plan import Plan
from edge_slm_runtime.planning import plan_of
from edge_slm_runtime.ranking import candidates, score
from edge_slm_runtime.records import Generation, Request, Stats, Trace
from edge_slm_runtime.sampling import Logits, not_finite
from edge_slm_runtime.session import Session
from edge_slm_runtime.stream import Stream
from edge_slm_runtime.text import TextCodec
from edge_slm_runtime.variations import variations

_NO_MEMORY = "there is no memory for the answer", "close other streams, or ask for less"


class _Rows:
    """Rows of the cache that a caller has as long as this object is alive: no interruption can
    leave them counted."""

    def __init__(self, count: int) -> None:
        self.count = count


class SLM(Bound):
    """A loaded bundle; made by `load`. Its calls may come from several threads."""

    def __init__(
        self,
        manifest: Manifest,
        variant: Variant,
        codec: TextCodec,
        engine: Engine,
        lexicon: Sequence[bytes],
        load_ms: float,
        most_rows: int | None = None,
        deltas: Sequence[Delta] = (),
    ) -> None:
        """lexicon: see `KnownWords`; empty where the bundle has none. most_rows: of a batch, by
        memory; None is any. deltas: the adapters of the bundle; where the engine takes none,
        requests that choose one are refused. Raises AdapterInvalid."""
        self.manifest = manifest
        self.variant = variant
        self._codec = codec
        self._engine = engine
        self._lexicon = lexicon
        self._load_ms = load_ms
        self._most_rows = most_rows
        self._under_way: list[ref[_Rows]] = []
        self._adapters: dict[str, Adapter] = {}  # changed and copied by single operations
        for delta in deltas:
            self._add(delta, engine.adapted(delta) if engine.adapts else None)

    @property
    def schema(self) -> CommandSchema:
        """The command grammar. Raises NoCommandGrammar for a model without one."""
        return self.manifest.prompt.grammar

    @property
    def threads(self) -> int:
        """Compute threads of the engine."""
        return self._engine.threads

    @property
    def seeds(self) -> bool:
        """Whether the engine honours a seed."""
        return self._engine.seeds

    @property
    def adapters(self) -> dict[str, str]:
        """Name → task of the adapters that requests may choose from."""
        return {name: adapter.task for name, adapter in self._adapters.copy().items()}

    @memory_errors("there is no memory for the adapter", "remove another one")
    def add_adapter(self, path: str | os.PathLike[str], name: str = "", task: str = "") -> None:
        """Adds the adapter of a file (`edge-slm adapter` writes it), in the place of one of the
        same name. Answers under way go on with what they began with.

        name, task: in the place of its own. Raises AdapterInvalid, NotSupportedByEngine,
        UsedAfterFork, EngineError.
        """
        delta = Delta.read(path)
        delta = replace(delta, name=name or delta.name, task=task or delta.task)
        delta.check(self.manifest.model, self.manifest.prompt, self.manifest.base)
        self._add(delta, self._engine.adapted(delta))

    def remove_adapter(self, name: str) -> None:
        """Requests cannot choose it any more; answers under way keep it. Raises BadSetting."""
        if self._adapters.pop(name, None) is None:
            raise BadSetting(f"there is no adapter {shown(name)}", "`adapters` lists them")

    def generate(self, request: str | Request, **settings: Any) -> Generation:
        """Answers one request; settings: the other fields of `Request`.

        Raises a RequestError (EmptyRequest, RequestNotText, RequestTooLong,
        ControlTokenInRequest, UnknownTask, WordsOutOfRange,
        RelevanceOutOfRange, NoCommandGrammar, BadSetting) before anything is computed,
        NotSupportedByEngine, UsedAfterFork; TypeError for a setting that does not exist.
        """
        asked = self._answers(Request.of(request, **settings))
        return next(self._batch([asked], min(len(asked), self._most_together)))

    def stream(self, request: str | Request, **settings: Any) -> Stream:
        """`generate`, piece by piece: never a broken character, never part of a
        stop sequence, never a word that the length promise may take back. Without `best_of`."""
        answer = self._answer(Request.of(request, **settings))
        return Stream(self, answer, Closable(self._decode([answer], 1)))

    def generate_batch(
        self, requests: Iterable[str | Request], batch_size: int = 8, **settings: Any
    ) -> Closable[Generation]:
        """Answers in input order, each equal to what it would be alone (onnxruntime's int4: but
        for the rounding of its kernels, which add in another order for several rows).

        settings: as of `generate`, for all of them. Requests are drawn as places get free, so
        `requests` may be endless. A bad request raises when it is drawn, with its index from 0,
        and ends the batch: where that must not happen, `check` each one first.
        """
        if isinstance(requests, str | Request):
            raise BadSetting("requests is a single request", "give a list of them")
        rows = self._rows("batch_size", batch_size)
        return Closable(self._batch(self._drawn(requests, settings), rows))

    def session(self, rows: int = 8, waiting: int = 64) -> Session:
        """For callers of several threads or coroutines, whose answers are decoded together.

        rows: answers at a time, each equal to what `generate` gives (as in `generate_batch`).
        waiting: requests that may wait for a row. Raises BadSetting, OutOfMemory.
        """
        if not is_count(waiting) or waiting < 1:
            raise BadSetting(f"waiting is {shown(waiting)}", "allowed: 1 or more, whole")
        return Session(self, self._rows("rows", rows), int(waiting))

    def variations(self, request: str | Request, n: int = 4, **settings: Any) -> list[Generation]:
        """`n` answers with distinct texts, the best first by their `score` (see `variations`).

        They share the computing of the prompt, and have the seeds from the request's on; fewer,
        with a warning, where drawing three times does not give as many. At temperature 0 they
        are drawn at 0.8, with a warning. Raises as `generate`, BadSetting, NotSupportedByEngine.
        """
        return variations(self, Request.of(request, **settings), n, self._most_together)

    def plan(self, request: str | Request, **settings: Any) -> Fit:
        """The longest answer that fits the request's `deadline_ms` on this device, by a
        measurement that takes a few short answers. Raises as `generate`."""
        return fit(self, Request.of(request, **settings))

    @memory_errors(*_NO_MEMORY)
    def check(self, request: str | Request) -> Plan:
        """Everything that can be wrong with a request, found before it is run.

        Raises as `generate`. The Plan says what the model would be given.
        """
        return plan_of(
            Request.of(request),
            self.manifest,
            self._codec,
            self._engine,
            self._lexicon,
            self._adapters.copy(),
        )

    def greedy_ids(self, request: str, command: Command, max_new_tokens: int) -> tuple[int, ...]:
        """Greedy token ids of the bare model, nothing held back: goldens are made of them."""
        settings = {**command.as_dict(), "no_repeat_ngram_size": 0, "keep_length": False}
        settings |= {"known_words": False, "no_repeat_words": False, "syntax": "none"}
        settings |= {"adapter": "", "restate": False}
        return self.generate(request, max_new_tokens=max_new_tokens, **settings).token_ids

    def logits(self, ids: Sequence[int]) -> Logits:
        """The predictions [len(ids), V] after each of `ids`, computed by the steps that decode:
        what fidelity is measured on. Raises UsedAfterFork, EngineError."""
        rows = np.stack([row.copy() for row in self._engine.logits(ids)])
        if not np.isfinite(rows).all():
            raise not_finite()
        return rows

    def trace(self, request: str | Request, **settings: Any) -> Trace:
        """Answers a request and says when each token came. Raises as `generate`."""
        started = perf_counter()
        answer = self._answer(Request.of(request, **settings))
        seconds = [
            perf_counter() - started
            for step in self._decode([answer], 1)
            if answer.ids or step.done  # else a part of the prompt
        ]
        return Trace(answer.plan.prompt, tuple(answer.ids), tuple(seconds))

    def trim_memory(self) -> None:
        """Drops the keys and values kept of earlier prompts (`prefix_cache_mb`), for when the
        system warns of short memory. Answers under way are not touched."""
        self._engine.trim_memory()

    def close(self) -> None:
        """Frees the model; a later call raises EngineError."""
        self._engine.close()

    def describe(self) -> str:
        """Lines for people: the model, what can be asked of it, and the variant that is loaded."""
        v = self.variant
        facts = [
            *model_facts(self.manifest),
            ("loaded", f"{v.name} ({v.engine}, {v.precision}) on {self.threads} threads"),
        ]
        width = max(len(name) for name, _ in facts)
        return "\n".join(f"{name:{width}}  {value}" for name, value in facts)

    def __repr__(self) -> str:
        return f"<SLM {self.manifest.name!r}: {self.variant.name} on {self.threads} threads>"

    def __enter__(self) -> SLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, delta: Delta, memory: Any) -> None:
        self._adapters[delta.name] = Adapter(delta.name, delta.task, delta.digest, memory)

    def _rows(self, name: str, rows: int) -> int:
        """`rows` as the setting of that name, checked."""
        if not is_count(rows) or rows < 1:
            raise BadSetting(f"{name} is {shown(rows)}", "allowed: 1 or more, whole")
        if self._most_rows and rows > self._most_rows:
            raise OutOfMemory(
                f"a {name} of {shown(rows)} needs more than max_memory_mb",
                f"at most {self._most_rows}",
            )
        return int(rows)

    @property
    def _most_together(self) -> int:
        """Rows that the answers to one request have at a time."""
        return min(8, self._most_rows or 8)

    def _answer(self, request: Request) -> Answer:
        if request.best_of != 1:
            raise BadSetting(
                f"best_of is {shown(request.best_of)}, and this is one answer as it comes",
                "use generate or generate_batch",
            )
        started = perf_counter()
        return answer_to(self.check(request), self._codec, started)

    def _answers(self, request: Request) -> tuple[Answer, ...]:
        """What is decoded for a request: its candidates where it asks for the best of them."""
        if request.best_of == 1:
            return (self._answer(request),)
        started = perf_counter()
        self.check(request)
        return tuple(
            answer_to(self.check(one), self._codec, started) for one in candidates(request)
        )

    def _decode(self, answers: Iterable[Answer], rows: int) -> Generator[Step, None, None]:
        return ended_at_exit(self._bounded(answers, rows))

    def _bounded(self, answers: Iterable[Answer], rows: int) -> Generator[Step, None, None]:
        """Counts the rows of all callers that are under way, streams left open too."""
        mine = _Rows(rows if self._engine.batches else 1)
        try:
            self._under_way.append(ref(mine))  # without a lock, as in `PrefixCache`
            used = self._rows_under_way()
            if self._most_rows and used > self._most_rows:
                raise OutOfMemory(
                    f"{used} answers at a time need more than max_memory_mb",
                    f"at most {self._most_rows}; finish or close streams",
                )
            with memory_errors(*_NO_MEMORY):
                yield from self._engine.decode(answers, mine.count)
        finally:
            del mine  # now, although an error may keep this frame

    def _rows_under_way(self) -> int:
        used = 0
        for one in tuple(self._under_way):
            if rows := one():
                used += rows.count
            else:
                with suppress(ValueError):  # another caller has just removed it
                    self._under_way.remove(one)
        return used

    def _drawn(
        self, requests: Iterable[str | Request], settings: dict[str, Any]
    ) -> Iterator[tuple[Answer, ...]]:
        for index, request in enumerate(requests):
            try:
                answers = self._answers(Request.of(request, **settings))
            except EdgeSlmError as error:
                raise error.at(f"request {index} of the batch") from None
            yield answers

    def _batch(
        self, requests: Iterable[tuple[Answer, ...]], batch_size: int
    ) -> Generator[Generation, None, None]:
        order: deque[tuple[Answer, ...]] = deque()

        def drawn() -> Iterator[Answer]:
            for answers in requests:
                order.append(answers)
                yield from answers

        for step in self._decode(drawn(), batch_size):
            while step.done and order and all(answer.finish for answer in order[0]):
                yield self._best_of(order.popleft())

    def _best_of(self, answers: tuple[Answer, ...]) -> Generation:
        if len(answers) == 1:
            return self._result_of(answers[0])
        best = max(answers, key=_score_of)
        best.ended = max(answer.ended for answer in answers)
        return self._result_of(best)

    def _result_of(self, answer: Answer, cancelled: int | None = None) -> Generation:
        """cancelled: characters that its reader got of an answer that he left; None: all."""
        total = answer.ended - answer.started
        plan, count = answer.plan, len(answer.ids)
        text = plan.syntax.restored(answer.text) if plan.syntax else answer.text
        text = text[:cancelled]
        words = count_words(answer.text if cancelled is None else text)
        low, high = tolerance(plan.asked.words) if plan.asked.words else (0, 0)
        seed = answer.seed if self._engine.seeds else None
        logprobs = tuple(answer.logprobs[:count]) if plan.logprobs else None
        stats = Stats(
            engine=self.variant.engine,
            precision=self.variant.precision,
            threads=self._engine.threads,
            prompt_tokens=len(plan.prompt),
            cached_tokens=answer.cached,
            new_tokens=count,
            guessed_tokens=answer.guessed,
            ttft_ms=(answer.first - answer.started) * 1e3,
            tpot_ms=(answer.last - answer.first) * 1e3 / (count - 1) if count > 1 else None,
            tokens_per_second=count / total if count else 0.0,
            total_ms=total * 1e3,
            peak_rss_mb=peak_rss_mb(),
            load_ms=self._load_ms,
        )
        return Generation(
            text=text,
            words=words,
            request=plan.request,
            asked=plan.asked,
            commanded=plan.commanded,
            finish_reason=answer.finish or plan.limit if cancelled is None else "cancelled",
            in_tolerance=low <= words <= high if plan.asked.words else None,
            seed=seed,
            token_ids=tuple(answer.ids),
            warnings=(*plan.warnings, *answer.warnings()),
            stats=stats,
            logprobs=logprobs,
            score=_score_of(answer) if plan.logprobs else None,
            confidence=answer.confidence,
        )


def _score_of(answer: Answer) -> float:
    plan = answer.plan
    about = plan.syntax.text if plan.syntax else plan.request
    shown = bool(plan.texts)
    logprobs = answer.logprobs[: len(answer.ids)]
    return score(
        logprobs,
        about,
        answer.text,
        torn=answer.torn,
        shows_text=shown,
        confidence=answer.confidence,
    )
