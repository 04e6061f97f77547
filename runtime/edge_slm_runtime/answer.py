"""State of one answer while it is decoded: chooses ids, keeps the length promise, and decides
how much of the text may be shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from edge_slm_runtime.bans import bans_of, is_word
from edge_slm_runtime.choices import Choices
from edge_slm_runtime.command import count_words
from edge_slm_runtime.keeps import Keeps
from edge_slm_runtime.length import CLAUSE, SENTENCE, LengthKeeper, ending, ends_sentence
from edge_slm_runtime.lexicon import KnownWords
from edge_slm_runtime.plan import FinishReason, Plan
from edge_slm_runtime.prompt_syntax import Placer
from edge_slm_runtime.repeats import Repeats
from edge_slm_runtime.sampling import Logits, Refusal, Sampler, log_probability
from edge_slm_runtime.text import Detokenizer, StopMatcher, TextCodec

_WORD_TOKENS = 8  # more than most words have
_TRIES = 4  # of words at a place
_HALF = math.log(0.5)
_LEAST = float(np.finfo(np.float32).min)  # of a token that is taken where there is no other


class _Before(NamedTuple):
    """The state before a token that may be taken back: how many came before, the logits of the
    others, and the model's own where they are needed."""

    tokens: int
    text: str
    bytes: tuple[bytes, int]
    logits: Logits
    own: Logits | None
    word_stays: bool


class Step(NamedTuple):
    """The effect of one token on an answer: the text that became final, and whether it ended."""

    answer: Answer
    text: str
    done: bool


class Answer:
    """Turns the tokens of one answer into text, one `accept` per token.

    An engine that steps itself asks `choose`; one that runs its own loop asks
    `may_end` and feeds `accept`.

    `choose` may take back the last tokens, and return one in the place of the first of them:
    those whose text proves to end in a banned phrase once the next token is known, and those of
    a word that cannot well become a known one.
    """

    def __init__(self, plan: Plan, codec: TextCodec, started: float) -> None:
        """`started`: perf_counter() at submission, before tokenising."""
        self.plan = plan
        self.ids: list[int] = []
        self.logprobs: list[float] = []  # of `ids`, and of the end
        self.text = ""
        self.torn = False  # its length cut it within a sentence
        self.confidence: float | None = None  # see `confidence`
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
        self._placer = Placer(plan.syntax) if plan.syntax else None
        self._repeats = Repeats(plan.request) if plan.no_repeat_words else None
        self._bans = bans_of(plan.ban) if plan.ban else None
        # Tokens after which the text ends in a banned phrase, unless its last word goes on.
        self._doubts: list[_Before] = []
        self._word: _Before | None = None  # the token that began the last word, if it may go on
        self._anew = 0, 0  # where the last word was taken back, in characters, and how often
        self._keeps = Keeps(plan.keep, codec.encode, plan.texts) if plan.keep else None
        self._choices = Choices(plan.choices, codec.encode) if plan.choices else None
        begin = plan.beginnings
        self._beginnings = Choices(begin, codec.encode, leads=("",)) if begin else None
        self._due: list[int] = []  # tokens of phrases to keep, which come next
        self._word_stays = False  # the next token must not make the last word another one
        self._is_last = False  # the next token ends the answer
        # The model would end the answer at this full stop, and it is too short.
        self._held_back = False
        self._from: Logits = np.empty(0, np.float32)  # what the last token was chosen from
        self._shown = 0
        self._logits: Logits | None = None
        self._own: Logits | None = None  # before anything is held back
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

    def warnings(self) -> Iterator[str]:
        """What an answer that has ended lacks."""
        if self._keeps and (missing := self._keeps.missing(self.text)):
            yield f"the answer ended before these were in it: {', '.join(missing)}"

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
        if self.plan.logprobs:
            self._own = logits.copy()
        for part in self._never:
            part.fill(-np.inf)
        if self._keeper:
            self._keep_length(logits, self._keeper)
        if self._beginnings and (allowed := self._beginnings.next(self.ids, ())):
            token = self._one_of(logits, allowed)
            self._word_stays = True
        elif self._choices:
            token = self._chosen(logits, self._choices)
        elif self._bans or self._keeps or self.plan.known or self._word_stays:
            token = self._due.pop(0) if self._due else self._constrained(logits)
        else:
            self._from = logits
            unfit = self._repeats or self._keeper
            token = self._sampler.pick(logits, self._is_unfit if unfit else None)
        if token in self.ends and self._keeper and self._keeper.in_sentence(self.text):
            token = self._to_sentence_end(self._keeper)
        if self._own is not None:
            self.logprobs[len(self.ids) :] = [log_probability(self._own, (token,))]
        return token

    def _keep_length(self, logits: Logits, keeper: LengthKeeper) -> None:
        self._held_back = False
        if self.may_end():
            keeper.note(self.text, log_probability(logits, (*self.ends, self._codec.full_stop)))
            return
        ends = [*self.ends]
        if ends_sentence(self.text):
            self._held_back = bool(logits[ends].max() == logits.max())
        logits[ends] = -np.inf

    def _chosen(self, logits: Logits, choices: Choices) -> int:
        token = self._one_of(logits, choices.next(self.ids, self.ends))
        self._is_last = {*choices.next([*self.ids, token], self.ends)} == {*self.ends}
        return token

    def _one_of(self, logits: Logits, allowed: Sequence[int]) -> int:
        """One of these tokens, which may repeat what came before."""
        likely = logits[allowed]
        logits.fill(-np.inf)
        logits[allowed] = likely
        return self._sampler.draw(logits)

    def _constrained(self, logits: Logits) -> int:
        """A token that brings no banned phrase and no unknown word, or the first of phrases that
        it is time for."""
        token = self._allowed(logits)
        if not self._keeps or not (missing := self._keeps.missing(self.text)):
            return token
        self._due = self._keeps.quoted(self.text, missing, self._fits)
        if not self._due and self._is_time(token, missing, self._keeps):
            self._due = self._keeps.ids(self.text, missing, self._fits)
        if not self._due:
            return token
        self._word_stays = True
        self._doubts.clear()  # that `token` has begun
        self._word = None
        self._sampler.take_back()
        for one in self._due:
            self._sampler.note(one)
        return self._due.pop(0)

    def _fits(self, added: str) -> bool:
        return not self._bans or self._bans.closed(f"{self.text}{added} ", len(self.text)) is None

    def _is_time(self, token: int, missing: Sequence[str], keeps: Keeps) -> bool:
        left = self.plan.budget - len(self.ids) - keeps.tokens(missing)
        if token in self.ends or left <= 0:
            return True
        if self._goes_on(token) or self._detokenizer.state[0]:
            return False
        if self._keeper is None or left < _WORD_TOKENS:
            return left < _WORD_TOKENS
        words, end = self.words + keeps.words(missing), ending(self.text) if self.text else 1
        if end == CLAUSE and not keeps.can_wait(missing):
            return 2 * words >= self._keeper.words
        return words >= (self._keeper.words if end else self._keeper.max)

    def _goes_on(self, token: int) -> bool:
        """Whether a token may belong to the last word of the text."""
        piece = self._detokenizer.peek(token)
        return not piece or (is_word(piece[:1]) and is_word(self.text[-1:]))

    def _to_sentence_end(self, keeper: LengthKeeper) -> int:
        """Where the model wants to end within a sentence: the full stop, if that is likelier
        than all else that could follow; where sentences came before, what follows. Otherwise
        the end."""
        self._sampler.take_back()
        others = self._from.copy()
        others[[*self.ends]] = -np.inf
        best = int(others.argmax())
        mark = self._detokenizer.peek(best)
        unknown = self._unknown()
        full_stop = ending(self.text + mark) == SENTENCE and self._fits(mark)
        full_stop = full_stop and not keeper.breaks_off(self.text, mark)
        full_stop = full_stop and not (unknown and unknown(best))
        if full_stop and log_probability(others, (best,)) > _HALF:
            self._is_last = True
        elif keeper.is_prose(self.text):
            self._word_stays = True
            return self._allowed(others, again=True)
        else:
            best = self.ends[0]
        self._sampler.note(best)
        return best

    def _allowed(self, logits: Logits, *, again: bool = False) -> int:
        """A token that is not refused, and proves no banned phrase; `again` of these logits."""
        pick, self._from = self._sampler.draw if again else self._sampler.pick, logits
        anew = self._word_anew if self._word else None
        token = pick(logits, self._refuses, self._unknown(), anew)
        while self._doubts and self._closes(token) is not None:
            self._sampler.take_back()
            self._go_back(self._doubts.pop())
            token = self._sampler.draw(self._from, self._refuses, self._unknown())
        ends = token in self.ends
        if self._bans and not ends and self._bans.open(self._text_with(token)):
            self._doubts.append(self._before(token, -np.inf))
        else:
            self._doubts.clear()
        if self.plan.known:
            self._word = None if ends else self._before_word(token, self.plan.known)
        self._word_stays = False
        return token

    def _before_word(self, token: int, known: KnownWords) -> _Before | None:
        """The state before the word that the text ends in with a token; None where it ends in
        none, or words were taken back there often enough."""
        size, piece = known.begun(self._text_with(token)), self._detokenizer.peek(token)
        if not size or size > len(piece):  # the token goes on with the word
            return self._word if size else None
        return None if self._anew == (len(self.text), _TRIES) else self._before(token, _LEAST)

    def _word_anew(self) -> int:
        """Another word or mark in the place of the last word, which is not known as the model
        would go on with it: a whole one."""
        assert self._word
        assert self.plan.known
        self._go_back(self._word)
        self._doubts.clear()
        at, times = self._anew
        self._anew = len(self.text), times + 1 if at == len(self.text) else 1
        pending = self._detokenizer.state[0]
        avoided = self.plan.known.refusal(self.text, pending, whole=True)
        return self._sampler.draw(self._from, self._refuses, avoided)

    def _before(self, token: int, value: float) -> _Before:
        """With that value in the place of the token's logit."""
        others, state = self._from.copy(), self._detokenizer.state
        others[token] = value
        return _Before(len(self.ids), self.text, state, others, self._own, self._word_stays)

    def _go_back(self, before: _Before) -> None:
        for _ in self.ids[before.tokens :]:
            self._sampler.take_back()
        tokens, self.text, self._detokenizer.state, self._from, self._own, self._word_stays = before
        del self.ids[tokens:]
        self._word = None

    def _refuses(self, token: int) -> bool:
        """Whether a token completes a phrase that the text has not had in doubt, or makes the
        last word another one that must stay."""
        if self._is_unfit(token):
            return True
        if self._word_stays and token not in self.ends and self._goes_on(token):
            return True
        end = self._closes(token) if self._bans else None
        return end is not None and not (self._doubts and end <= len(self.text))

    def _unknown(self) -> Refusal | None:
        """Whether a token makes a word that is not known."""
        known = self.plan.known
        return known.refusal(self.text, self._detokenizer.state[0]) if known else None

    def _is_unfit(self, token: int) -> bool:
        """Whether a token repeats what came before, ends a sentence that must go on, or goes on
        without a space behind the full stop at which the model would end: it has seen no text
        go on there."""
        if token in self.ends:
            return self._repeats is not None and self._repeats.refuses_end(self.text)
        piece = self._detokenizer.peek(token)
        if self._repeats and self._repeats.refuses(self.text, piece):
            return True
        if self._held_back:
            return piece[:1].isalpha()
        return self._keeper is not None and self._keeper.breaks_off(self.text, piece)

    def _closes(self, token: int) -> int | None:
        """Where a banned phrase ends that is certain with this token."""
        assert self._bans
        if token in self.ends:  # as if a space came
            return self._bans.closed(f"{self.text} ", len(self.text))
        return self._bans.closed(self._text_with(token), len(self.text))

    def _text_with(self, token: int) -> str:
        return self.text + self._trimmed(self._detokenizer.peek(token))

    def _trimmed(self, piece: str) -> str:
        return piece if self.text else piece.lstrip()

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
            self._grow(self._trimmed(piece))
            if self._is_last and not self.finish:
                self.finish = "stop"
        self.ended = now
        if not self.finish and self.called_off:
            return self.end()
        return self._show()

    def end(self) -> Step:
        """Ends it where it is, `called_off`: the text is what it would be with its tokens used
        up. An engine calls it between the passes of a prompt, `accept` after them."""
        self.finish = self.called_off
        if self._keeper:
            self.text = self._cut(finished=False)
        self.ended = perf_counter() - self.away
        return self._show()

    def _show(self) -> Step:
        done = self.finish is not None
        if done:
            self.text = self.text.rstrip()
            if self._bans:  # it may have been cut within a word
                self.text = self._bans.without_open(self.text, self._shown)
            if self.plan.known:
                self.text = self.plan.known.without_torn(self.text, self._shown)
        end = len(self.text) if done else self._sure()
        shown, self._shown = self._shown, max(end, self._shown)
        piece = self.text[shown : self._shown]
        return Step(self, self._placer.push(piece, done) if self._placer else piece, done)

    def _grow(self, piece: str) -> None:
        self.text += piece
        stop = self._stops.find(self.text, len(piece))
        if stop is not None:
            self.text, self.finish = self.text[:stop], "stop_sequence"
            if self._keeper and self.words > self._keeper.max:
                self.text, self.finish = self._cut(), "length"
        elif self._keeper and self._keeper.is_full(self.text):
            self.text, self.finish = self._cut(), "length"
        elif len(self.ids) >= self.plan.budget:
            self.finish = self.plan.limit
            if self._keeper:
                self.text = self._cut(finished=False)

    def _cut(self, *, finished: bool = True) -> str:
        """The text within its length; prose that the model went on with gets its full stop."""
        assert self._keeper
        least = self._keeps.end(self.text) if self._keeps else 0
        self.text = self._keeper.cut(self.text, finished=finished, least=least)
        self.torn = ending(self.text) != SENTENCE
        stopped = finished and self._keeper.lacks_stop(self.text) and self._fits(".")
        return f"{self.text}." if stopped else self.text

    def _sure(self) -> int:
        """Characters that will not be taken back: not the white space at the end,
        not what may become a stop sequence, not what a cut may remove."""
        sure = len(self.text) - self._stops.held(self.text)
        if self._bans:
            sure = len(self._bans.without_open(self.text[:sure], self._shown))
        if self._doubts:
            sure = min(sure, len(self._doubts[0].text))
        if self._word:
            sure = min(sure, len(self._word.text))
        elif self.plan.known:
            sure = min(sure, len(self.plan.known.without_torn(self.text, self._shown)))
        if self._keeper:
            sure = min(sure, self._keeper.sure(self.text))
        return len(self.text[:sure].rstrip())
