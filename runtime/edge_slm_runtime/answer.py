"""State of one answer while it is decoded: chooses ids, keeps the length promise, and decides
how much of the text may be shown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np

from edge_slm_runtime.command import Command, count_words
from edge_slm_runtime.length import LengthKeeper
from edge_slm_runtime.sampling import Logits, Sampler, Sampling, log_probability
from edge_slm_runtime.text import Detokenizer, StopMatcher, TextCodec

FinishReason = Literal[
    "stop", "length", "stop_sequence", "max_tokens", "context", "cancelled", "deadline"
]


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request: the prompt of the model, and the limits of the answer.

    budget: tokens that may be generated; `limit` is the finish reason when they
    are used up. `words` is None unless the length promise holds. deadline_ms: None is none.
    """

    request: str
    asked: Command
    commanded: Command
    warnings: tuple[str, ...]
    prompt: tuple[int, ...]
    budget: int
    limit: Literal["max_tokens", "context"]
    words: int | None
    stop: tuple[str, ...]
    sampling: Sampling
    cache_key: str = ""
    deadline_ms: float | None = None


class Step(NamedTuple):
    """The effect of one token on an answer: the text that became final, and whether it ended."""

    answer: Answer
    text: str
    done: bool


class Answer:
    """Turns the tokens of one answer into text, one `accept` per token.

    An engine that steps itself asks `choose`; one that runs its own loop asks
    `may_end` and feeds `accept`.
    """

    def __init__(self, plan: Plan, codec: TextCodec, started: float) -> None:
        """`started`: perf_counter() at submission, before tokenising."""
        self.plan = plan
        self.ids: list[int] = []
        self.text = ""
        self.finish: FinishReason | None = None
        # Tokens of the prompt that the engine did not have to compute; tokens it guessed right.
        self.cached = self.guessed = 0
        # perf_counter() of submission, first and last token, and end; less `away`,
        # the seconds in which the reader kept the engine waiting, as one of a session never does.
        self.started = self.first = self.last = self.ended = started
        self.away, self.can_wait = 0.0, True
        self.cancelled = False  # any thread may set it
        self.deadline = math.inf  # perf_counter()
        if plan.deadline_ms is not None:
            self.deadline = started + plan.deadline_ms / 1e3
        self._codec = codec
        self._detokenizer = Detokenizer(codec)
        self._stops = StopMatcher(plan.stop)
        self._keeper = LengthKeeper(plan.words) if plan.words else None
        self._sampler = Sampler(plan.sampling, plan.prompt)
        self._shown = 0
        self._logits: Logits | None = None
        self._never: tuple[Logits, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end the answer."""
        return self._codec.ends

    @property
    def seed(self) -> int | None:
        return self._sampler.seed

    @property
    def words(self) -> int:
        return count_words(self.text)

    @property
    def called_off(self) -> FinishReason | None:
        """Why it is to end now, whatever the model has written; None: it is not."""
        if self.cancelled:
            return "cancelled"
        return "deadline" if perf_counter() > self.deadline else None

    def may_end(self) -> bool:
        return self._keeper is None or self._keeper.may_end(self.text)

    def banned(self, vocab_size: int) -> list[int]:
        """Ids of `TextCodec.never`, for an engine that samples by itself; `choose` masks them."""
        return [i for ids in self._codec.never(vocab_size) for i in range(ids.start, ids.stop)]

    def choose(self, logits: Logits) -> int:
        """The next token from `logits` [V], which it changes."""
        if logits is not self._logits:  # one array for all steps, as a rule
            self._logits = logits
            self._never = tuple(logits[ids] for ids in self._codec.never(logits.size))
        for part in self._never:
            part.fill(-np.inf)
        if self._keeper:
            if self.may_end():
                self._keeper.note(self.text, log_probability(logits, self.ends))
            else:
                logits[[*self.ends]] = -np.inf
        return self._sampler.pick(logits)

    def accept(self, token: int) -> Step:
        """Takes one token; after a `done` step no more may come."""
        now = perf_counter() - self.away
        if not self.ids:
            self.first = now
        if token in self.ends:
            self.finish = "stop"
        else:
            self.last = now
            self.ids.append(token)
            piece = self._detokenizer.push(token)
            self._grow(piece if self.text else piece.lstrip())
        self.ended = now
        if not self.finish and self.called_off:
            return self.end()
        return self._show()

    def end(self) -> Step:
        """Ends it where it is, `called_off`: the text is what it would be with its tokens used
        up. An engine calls it between the passes of a prompt, `accept` after them."""
        self.finish = self.called_off
        if self._keeper:
            self.text = self._keeper.cut(self.text, finished=False)
        self.ended = perf_counter() - self.away
        return self._show()

    def _show(self) -> Step:
        if self.finish:
            self.text = self.text.rstrip()
        end = len(self.text) if self.finish else self._sure()
        shown, self._shown = self._shown, max(end, self._shown)
        return Step(self, self.text[shown : self._shown], self.finish is not None)

    def _grow(self, piece: str) -> None:
        self.text += piece
        stop = self._stops.find(self.text, len(piece))
        if stop is not None:
            self.text, self.finish = self.text[:stop], "stop_sequence"
            if self._keeper and self.words > self._keeper.max:
                self.text, self.finish = self._keeper.cut(self.text), "length"
        elif self._keeper and self._keeper.is_full(self.text):
            self.text, self.finish = self._keeper.cut(self.text), "length"
        elif len(self.ids) >= self.plan.budget:
            self.finish = self.plan.limit
            if self._keeper:
                self.text = self._keeper.cut(self.text, finished=False)

    def _sure(self) -> int:
        """Characters that will not be taken back: not the white space at the end,
        not what may become a stop sequence, not what a cut may remove."""
        sure = len(self.text) - self._stops.held(self.text)
        if self._keeper:
            sure = min(sure, self._keeper.sure(self.text))
        return len(self.text[:sure].rstrip())
