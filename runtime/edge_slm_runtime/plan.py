"""A checked request: what the model is given, and the limits of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_slm_runtime.command import Command
from edge_slm_runtime.deltas import Adapter
from edge_slm_runtime.lexicon import KnownWords
from edge_slm_runtime.prompt_syntax import Shielded
from edge_slm_runtime.sampling import Sampling

FinishReason = Literal[
    "stop", "length", "stop_sequence", "max_tokens", "context", "cancelled", "deadline"
]


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request: the prompt of the model, and the limits of the answer.

    texts: those of `keep` that are to be shown in quotation marks.
    budget: tokens that may be generated; `limit` is the finish reason when they
    are used up. `words` is None unless the length promise holds. `syntax` is put back into
    the text of the model; `ban`: phrases that this text does not have. `logprobs`: whether
    they are recorded. `keep`: phrases that it has. `choices`: it is one of these.
    deadline_ms: None is none. known: the words that it may have, None is any. beginnings: it
    begins with one of them, if there are any. levels: tokens of the levels, the highest last,
    where the model is to tell its confidence.
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
    syntax: Shielded | None = None
    ban: tuple[str, ...] = ()
    logprobs: bool = False
    keep: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    deadline_ms: float | None = None
    no_repeat_words: bool = False
    texts: tuple[str, ...] = ()
    known: KnownWords | None = None
    beginnings: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()
    adapter: Adapter | None = None
