"""The SDK's one object: a loaded bundle that answers requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from time import perf_counter
from types import TracebackType
from typing import Any, Literal
from weakref import ref

import numpy as np

from edge_slm_runtime.answer import Answer, Plan, Step
from edge_slm_runtime.bans import Bans, units
from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.closable import Closable
from edge_slm_runtime.command import Command, CommandSchema, count_words, is_count
from edge_slm_runtime.deadline import Fit, fit
from edge_slm_runtime.description import model_facts
from edge_slm_runtime.engines.base import Engine, ended_at_exit
from edge_slm_runtime.errors import (
    BadSetting,
    EdgeSlmError,
    NotSupportedByEngine,
    OutOfMemory,
    RequestTooLong,
    shown,
)
from edge_slm_runtime.keeps import Keeps, texts_to_show
from edge_slm_runtime.length import tolerance
from edge_slm_runtime.memory import memory_errors, peak_rss_mb
from edge_slm_runtime.prompt_syntax import Shielded, shield
from edge_slm_runtime.records import Generation, Request, Stats, Trace
from edge_slm_runtime.request_text import clean_request
from edge_slm_runtime.sampling import Logits, Sampling, not_finite
from edge_slm_runtime.session import Session
from edge_slm_runtime.stream import Stream
from edge_slm_runtime.text import TextCodec
from edge_slm_runtime.variations import score, variations

_NO_MEMORY = "there is no memory for the answer", "close other streams, or ask for less"
_LEAST_ROOM = 16  # tokens that must be left for an answer of no asked length
_STOPS_MAX, _BANS_MAX, _KEEPS_MAX = 64, 10_000, 16  # all stops are looked for after every token
_LONGEST_TEXT = 256  # characters of a stop or ban
_DEADLINE_MAX = 1e9  # ms
_TOKENS_PER_WORD = 1.5  # of English under a small vocabulary; for the check beforehand only


class _Rows:
    """Rows of the cache that a caller has as long as this object is alive: no interruption can
    leave them counted."""

    def __init__(self, count: int) -> None:
        self.count = count


class SLM:
    """A loaded bundle; made by `load`. Its calls may come from several threads."""

    def __init__(
        self,
        manifest: Manifest,
        variant: Variant,
        codec: TextCodec,
        engine: Engine,
        load_ms: float,
        most_rows: int | None = None,
    ) -> None:
        """most_rows: of a batch, by memory; None is any."""
        self.manifest = manifest
        self.variant = variant
        self._codec = codec
        self._engine = engine
        self._load_ms = load_ms
        self._most_rows = most_rows
        self._under_way: list[ref[_Rows]] = []

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

    def generate(self, request: str | Request, **settings: Any) -> Generation:
        """Answers one request; settings: the other fields of `Request`.

        Raises a RequestError (EmptyRequest, RequestNotText, RequestTooLong,
        ControlTokenInRequest, UnknownTask, WordsOutOfRange,
        RelevanceOutOfRange, NoCommandGrammar, BadSetting) before anything is computed,
        NotSupportedByEngine, UsedAfterFork; TypeError for a setting that does not exist.
        """
        return next(self._batch([self._answer(Request.of(request, **settings))], 1))

    def stream(self, request: str | Request, **settings: Any) -> Stream:
        """`generate`, piece by piece: never a broken character, never part of a
        stop sequence, never a word that the length promise may take back."""
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
        rows = min(8, self._most_rows or 8)
        return variations(self, Request.of(request, **settings), n, rows)

    def plan(self, request: str | Request, **settings: Any) -> Fit:
        """The longest answer that fits the request's `deadline_ms` on this device, by a
        measurement that takes a few short answers. Raises as `generate`."""
        return fit(self, Request.of(request, **settings))

    @memory_errors(*_NO_MEMORY)
    def check(self, request: str | Request) -> Plan:
        """Everything that can be wrong with a request, found before it is run.

        Raises as `generate`. The Plan says what the model would be given.
        """
        request = Request.of(request)
        command = self.manifest.prompt.check(request.command)
        sampling = request.sampling
        self._engine.check(sampling)
        stop = _texts("stop", request.stop, _STOPS_MAX)
        ban = _texts("ban", request.ban, _BANS_MAX)
        if blank := [text for text in ban if not units(text)]:
            raise BadSetting(f"ban has {shown(blank[0])}", "give words or phrases")
        keep = _texts("keep", request.keep, _KEEPS_MAX)
        _check_keep(keep, ban, stop)
        if not isinstance(request.logprobs, bool):
            raise BadSetting(f"logprobs is {shown(request.logprobs)}", "allowed: True or False")
        if (ban or keep or request.logprobs) and not self._engine.constrains:
            what = "ban or keep words" if ban or keep else "report logprobs"
            raise NotSupportedByEngine(
                f"{self._engine.name} cannot {what}",
                "load engine onnxruntime or numba",
            )
        if not isinstance(request.cache_key, str):
            raise BadSetting(f"cache_key is {shown(request.cache_key)}", "allowed: a text")
        if not isinstance(request.keep_length, bool):
            raise BadSetting(
                f"keep_length is {shown(request.keep_length)}", "allowed: True or False"
            )
        if not isinstance(request.no_repeat_words, bool):
            raise BadSetting(
                f"no_repeat_words is {shown(request.no_repeat_words)}", "allowed: True or False"
            )
        deadline = request.deadline_ms
        if deadline is not None and not (
            isinstance(deadline, int | float)
            and not isinstance(deadline, bool)
            and 0 < deadline <= _DEADLINE_MAX
        ):
            raise BadSetting(f"deadline_ms is {shown(deadline)}", "allowed: above 0, up to 1e9")
        if request.syntax not in ("keep", "none"):
            raise BadSetting(f"syntax is {shown(request.syntax)}", "allowed: keep, none")
        told = Shielded(request.request)
        if request.syntax == "keep" and self.manifest.prompt.schema:
            told = shield(clean_request(request.request))
        prompt = self._codec.prompt(told.text, command.commanded)
        words = command.words if request.keep_length else None
        budget, limit = self._budget(len(prompt), request.max_new_tokens, command.words)
        if keep:
            self._check_room(keep, words, budget)
        warnings = (*command.warnings, *_needless(sampling))
        schema = self.manifest.prompt.schema
        if schema and command.commanded.task in schema.verbatim and self._keeps_texts(request):
            texts = (*keep, *texts_to_show(told.text))
            try:
                _check_keep(texts, ban, stop)
                self._check_room(texts, words, budget)
                keep = texts
            except BadSetting as error:
                warnings += (f"the text to show may not be in the answer: {error.problem}",)
        return Plan(
            request=request.request,
            asked=command.asked,
            commanded=command.commanded,
            warnings=warnings,
            prompt=tuple(prompt),
            budget=budget,
            limit=limit,
            words=words,
            stop=stop,
            sampling=sampling,
            cache_key=request.cache_key,
            syntax=told if told.slots or told.tail else None,
            ban=ban,
            logprobs=request.logprobs,
            keep=keep,
            deadline_ms=deadline,
            no_repeat_words=request.no_repeat_words,
        )

    def greedy_ids(self, request: str, command: Command, max_new_tokens: int) -> tuple[int, ...]:
        """Greedy token ids of the bare model, nothing held back: goldens are made of them."""
        settings = {**command.as_dict(), "no_repeat_ngram_size": 0, "keep_length": False}
        settings["syntax"] = "none"
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

    def _answer(self, request: str | Request) -> Answer:
        started = perf_counter()
        return Answer(self.check(request), self._codec, started)

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
    ) -> Iterator[Answer]:
        for index, request in enumerate(requests):
            try:
                answer = self._answer(Request.of(request, **settings))
            except EdgeSlmError as error:
                raise error.at(f"request {index} of the batch") from None
            yield answer

    def _batch(
        self, answers: Iterable[Answer], batch_size: int
    ) -> Generator[Generation, None, None]:
        order: deque[Answer] = deque()

        def drawn() -> Iterator[Answer]:
            for answer in answers:
                order.append(answer)
                yield answer

        for step in self._decode(drawn(), batch_size):
            while step.done and order and order[0].finish:
                yield self._result_of(order.popleft())

    def _keeps_texts(self, request: Request) -> bool:
        """Whether texts to show are kept: not where the model is to answer by itself."""
        return request.keep_length and self._engine.constrains

    def _check_room(self, keep: tuple[str, ...], words: int | None, budget: int) -> None:
        keeps = Keeps(keep, self._codec.encode)
        if words is not None and keeps.words(keep) > (most := tolerance(words)[1]):
            raise BadSetting(
                f"keep has {keeps.words(keep)} words, more than the {most} of words {words}",
                "ask for more words, or keep fewer",
            )
        if keeps.tokens(keep) > budget:
            raise BadSetting(
                f"keep takes {keeps.tokens(keep)} tokens, more than the {budget} of the answer",
                "keep fewer words, or allow more tokens",
            )

    def _budget(
        self, prompt: int, asked: int | None, words: int | None
    ) -> tuple[int, Literal["max_tokens", "context"]]:
        """Tokens that may be generated, and the finish reason when they are used up."""
        positions = self.manifest.model.positions
        room = positions - prompt
        if asked is None:
            need = _LEAST_ROOM if words is None else round(tolerance(words)[1] * _TOKENS_PER_WORD)
            what = f"about {need} for the answer"
        elif is_count(asked) and asked >= 1:
            need, what = asked, f"max_new_tokens {shown(asked)}"
        else:
            raise BadSetting(f"max_new_tokens is {shown(asked)}", "allowed: 1 or more, whole")
        if need > room:
            raise RequestTooLong(
                f"the prompt has {prompt} tokens; with {what} "
                f"that is more than the model's {positions} positions",
                "shorten the request, or ask for fewer words or tokens",
            )
        return (room, "context") if asked is None else (asked, "max_tokens")

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
        about = plan.syntax.text if plan.syntax else plan.request
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
            score=None if logprobs is None else score(logprobs, about, answer.text),
        )


def _texts(name: str, value: tuple[str, ...] | list[str] | str, most: int) -> tuple[str, ...]:
    """A setting that is a text or several. Raises BadSetting."""
    texts = (value,) if isinstance(value, str) else value
    if (
        isinstance(texts, tuple | list)
        and len(texts) <= most
        and all(isinstance(text, str) and 1 <= len(text) <= _LONGEST_TEXT for text in texts)
    ):
        return tuple(texts)
    raise BadSetting(
        f"{name} is {shown(value)}",
        f"allowed: up to {most} texts of 1 … {_LONGEST_TEXT} characters",
    )


def _check_keep(keep: tuple[str, ...], ban: tuple[str, ...], stop: tuple[str, ...]) -> None:
    """Raises BadSetting for phrases that cannot be kept."""
    bans = Bans(ban)
    for phrase in keep:
        if phrase != phrase.strip() or not units(phrase):
            raise BadSetting(f"keep has {shown(phrase)}", "give words without spaces around them")
        if bans.closed(f"{phrase} ", 0) is not None:
            raise BadSetting(f"keep has {shown(phrase)}, which ban forbids", "leave one out")
        if any(one in f" {phrase}" for one in stop):
            raise BadSetting(f"keep has {shown(phrase)}, which a stop ends", "leave one out")


def _needless(sampling: Sampling) -> Iterator[str]:
    """Warnings of settings that have no effect together."""
    if sampling.greedy and sampling.seed is not None:
        yield "the seed has no effect: at temperature 0 the likeliest token is taken"
