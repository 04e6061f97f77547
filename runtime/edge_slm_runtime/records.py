"""Requests, generated texts and their timings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from edge_slm_runtime.command import Command, python_value
from edge_slm_runtime.plan import FinishReason
from edge_slm_runtime.sampling import NO_REPEAT_NGRAM_SIZE, Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """A text to expand and the settings of the answer.

    request: the text. task, words, relevance: the command; None leaves it to the model.
    temperature … seed: see `Sampling`. no_repeat_words: no word twice in a row, no item twice in a
    list (see `repeats`; not with ctranslate2). known_words: only words of the bundle's lexicon and
    of the request, where it has a lexicon (see `lexicon`; not with ctranslate2). stop: the text
    ends before the first of these. max_new_tokens: None is what the context holds. keep_length:
    keep the length promise (see `length`). cache_key: keys and values of a prompt are used again
    only under the same one, so that one user of an app cannot learn from timings and
    `cached_tokens` what another asked for. syntax: `keep` that of image tools (see
    `prompt_syntax`), or `none`: it is text like any other. ban: words and phrases that the answer
    does not have (see `bans`). logprobs: see `Generation`. keep: phrases that it has, as they are.
    choices: the answer is one of these texts, whatever `words`. restate: it begins with the
    request, where the bundle has that for the task and the request is a caption (see `restating`;
    not with ctranslate2). deadline_ms: from the call on; the
    answer then ends with the pass of the model that is under way. adapter: the name of one that the
    model was loaded with, "" is none; None is that of the commanded task, if there is one. best_of:
    the answer is the best by `ranking.score` of so many, decoded together, and drawn at 0.5 where
    the temperature is 0 (the first of them then is the greedy one); not in streams and sessions,
    nor with ctranslate2.
    """

    request: str
    task: str | None = None
    words: int | None = None
    relevance: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = NO_REPEAT_NGRAM_SIZE
    no_repeat_words: bool = True
    known_words: bool = True
    restate: bool = True
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    max_new_tokens: int | None = None
    keep_length: bool = True
    cache_key: str = ""
    syntax: str = "keep"
    ban: tuple[str, ...] | list[str] | str = ()
    logprobs: bool = False
    keep: tuple[str, ...] | list[str] | str = ()
    choices: tuple[str, ...] | list[str] = ()
    deadline_ms: float | None = None
    adapter: str | None = None
    best_of: int = 1

    def __post_init__(self) -> None:
        for name in self.__slots__:
            object.__setattr__(self, name, python_value(getattr(self, name)))

    @classmethod
    def of(cls, request: str | Request, **settings: Any) -> Request:
        """A request with these settings; those that it has already are replaced.

        Raises TypeError for a setting that does not exist.
        """
        if isinstance(request, Request):
            return replace(request, **settings) if settings else request
        return cls(request, **settings)

    @property
    def command(self) -> Command:
        """Task, words and relevance of the request."""
        return Command(self.task, self.words, self.relevance)

    @property
    def sampling(self) -> Sampling:
        """The settings of the sampler, checked. Raises BadSetting."""
        return Sampling(
            self.temperature,
            self.top_k,
            self.top_p,
            self.repetition_penalty,
            self.no_repeat_ngram_size,
            self.seed,
        )


@dataclass(frozen=True, slots=True)
class Stats:
    """Timings in milliseconds, memory in MiB.

    ttft_ms: submission → first token, tokenising included. tpot_ms: mean time
    of each later token, (last − first) / (new_tokens − 1); None below 2 tokens.
    total_ms: submission → end of the answer; with new_tokens it gives
    tokens_per_second. In a stream, the time that the reader takes between pieces
    is left out. cached_tokens: of the prompt_tokens, those whose keys and values were
    computed for an earlier prompt. new_tokens: without end-of-text. guessed_tokens: of these,
    those that speculative decoding guessed right, so that they took no step of their own.
    peak_rss_mb: of this process so far.
    """

    engine: str
    precision: str
    threads: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    guessed_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    tokens_per_second: float
    total_ms: float
    peak_rss_mb: float
    load_ms: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Token ids of a prompt and of its answer, and the seconds from submission to each step
    of the engine: the answer's tokens, and its end where the model ended it."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """Generated text and its metadata.

    words: of the model's text, in which a construct of prompt syntax is its words.
    asked is what the caller wanted, commanded what the model was given.
    finish_reason: `stop` the model ended; `length` cut at the maximum of the
    length promise; `stop_sequence`; `max_tokens`; `context` the context is full;
    `cancelled` by `cancel` or `close` of its stream; `deadline` its time was over.
    in_tolerance: words against the *asked* words, None when none were asked.
    seed: reproduces a sampled answer; None when it was greedy, or when the
    engine has no seed. token_ids: all that the model generated, without
    end-of-text; a cut text has fewer. logprobs: the natural logarithm of the probability that
    the model itself gave each of them (at temperature 1, nothing held back), score what
    `variations` and `best_of` rank by (`ranking.score`), and confidence the probability, by the
    model itself, that the text has the highest level of relevance, where it learnt to judge;
    None unless they or logprobs were asked for.
    """

    text: str
    words: int
    request: str
    asked: Command
    commanded: Command
    finish_reason: FinishReason
    in_tolerance: bool | None
    seed: int | None
    token_ids: tuple[int, ...]
    warnings: tuple[str, ...]
    stats: Stats
    logprobs: tuple[float, ...] | None = None
    score: float | None = None
    confidence: float | None = None

    @property
    def achieved(self) -> Command:
        """The command that the text obeyed: the task and the words counted. Relevance is
        None: its scorer is not on the device (`edge-slm evaluate` measures it)."""
        return Command(self.commanded.task, self.words)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = asdict(self) | {"achieved": asdict(self.achieved)}
        data["token_ids"] = list(self.token_ids)
        data["warnings"] = list(self.warnings)
        data["logprobs"] = self.logprobs and list(self.logprobs)
        return data
