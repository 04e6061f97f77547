"""Fluency guards: defects of a text that are visible without knowing its subject.

The thresholds are our own, set so that texts written by people pass: see docs/rewards.md.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import prod

import numpy as np

from edge_slm.distill.rewards.base import Float32
from edge_slm.distill.samples import Sample
from edge_slm.progress import Progress
from edge_slm_runtime.keywords import WORD, stem, words_of
from edge_slm_runtime.words import UNFINISHED_SAMPLE

_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]]*(?=\s|$)")
_CLAUSE_END = re.compile(r"[,;:.!?]+(?=\s|$)")
_BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"), ("“", "”"), ("«", "»"))
_LOOP = re.compile(r"\b(\w+(?: \w+){0,11}?)(?: \1){3,}\b")  # up to 12 words, four times in a row
_NOISE = re.compile(
    r"([^\W\d_])\1{3,}"  # a letter four times in a row
    r"|([^\w\s.\-=*~])\2{3,}"  # a mark, unless it draws a line
    r"|\b[bcdfghjklmnpqrstvwxz]{6,}\b"  # a word without vowels
    r"|[^\W\d_]{31,}"  # a word that no language has
)


@dataclass(frozen=True, slots=True)
class Guards:
    """Each 0 … 1; 1 is without defect."""

    repetition: float
    truncation: float
    echo: float
    gibberish: float

    @property
    def fluency(self) -> float:
        """The product."""
        return float(prod(astuple(self)))


def guards(request: str, response: str) -> Guards:
    """The guards of a response; all 0 if it has no words."""
    if not words_of(response):
        return Guards(0.0, 0.0, 0.0, 0.0)
    # A repeated request must not hide a truncated end or dilute noise.
    single = once(request, response).strip()
    return Guards(
        _repetition(response),
        _truncation(single),
        _echo(request, response),
        _ramp(_noise_share(single), good=0.0, bad=0.2),
    )


def _ramp(value: float, *, good: float, bad: float) -> float:
    """1 up to `good`, 0 from `bad` on, straight in between."""
    return min(1.0, max(0.0, (bad - value) / (bad - good)))


def _repetition(text: str) -> float:
    """0 for a loop, however long the sound text before it."""
    if _LOOP.search(" ".join(words_of(text))):
        return 0.0
    return _ramp(repeated_share(text), good=0.15, bad=0.6)


def repeated_share(text: str) -> float:
    """Share of repeated words, 0 … 1: in an earlier trigram (cf. seq-rep-n of Welleck et
    al., arXiv 1908.04319), in an earlier clause, or equal to the word just before."""
    words: list[str] = []
    repeats: set[int] = set()
    seen: set[tuple[str, ...]] = set()
    for part in _CLAUSE_END.split(text):
        clause = words_of(part)
        start = len(words)
        words += clause
        for i in range(start, len(words)):
            trigram = tuple(words[max(0, i - 2) : i + 1])
            if len(trigram) == 3 and trigram in seen:
                repeats |= {i - 2, i - 1, i}
            if i > start and words[i] == words[i - 1]:
                repeats.add(i)
            seen.add(trigram)
        whole = ("", *clause)  # no word is empty: never taken for a trigram
        if clause and whole in seen:
            repeats |= set(range(start, len(words)))
        seen.add(whole)
    return len(repeats) / max(1, len(words))


def _truncation(text: str) -> float:
    """0.2: ends in the middle of a phrase. 0.5: a bracket or quotation mark stays open, or
    three sentences end and the last one does not. Lists and titles need no full stop."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    finished = bool(ends) and ends[-1] == len(text)
    if not finished and (text[-1] in ",;:-–—" or text.rsplit(maxsplit=1)[-1] in UNFINISHED_SAMPLE):
        return 0.2
    open_mark = text.count('"') % 2 or any(text.count(a) != text.count(b) for a, b in _BRACKETS)
    return 0.5 if open_mark or (len(ends) >= 3 and not finished) else 1.0


def _echo(request: str, response: str) -> float:
    """0 for a response that has all words of the request and no other; 1 when it adds two
    words, or a fifth of a long request, or has at most half of the request (a title,
    tags). Halved when it contains a request of three words or more twice."""
    asked = {stem(word) for word in words_of(request)}
    said = {stem(word) for word in words_of(response)}
    kept = len(asked & said) / max(1, len(asked))
    added = len(said - asked) / max(2.0, len(asked) / 5)
    adds = min(1.0, max(added, _ramp(kept, good=0.5, bad=1.0)))
    return adds / 2 if once(request, response) != response else adds


def once(request: str, response: str) -> str:
    """The response with only the first mention of the whole request, if the request has at
    least three words (good prose repeats shorter ones)."""
    words = words_of(request)
    if len(words) < 3 or " ".join(words_of(response)).count(" ".join(words)) < 2:
        return response
    matches = list(WORD.finditer(response))
    said = ["".join(words_of(match[0])) for match in matches]
    kept, start, i, mentions = "", 0, 0, 0
    while i < len(said):
        if said[i : i + len(words)] != words:
            i += 1
            continue
        mentions += 1
        if mentions > 1:
            kept += response[start : matches[i].start()]
            start = matches[i + len(words) - 1].end()
        i += len(words)
    return (kept + response[start:]).rstrip() if mentions > 1 else response


def _noise_share(text: str) -> float:
    """Share of noise characters: invalid or unassigned ones, marks beyond a quarter of the
    text, letters of impossible words."""
    kinds = [unicodedata.category(char) for char in text]
    broken = sum(
        char == "\ufffd" or (kind in ("Cc", "Cn", "Co", "Cs") and not char.isspace())
        for char, kind in zip(text, kinds, strict=True)
    )
    marks = sum(kind[0] in "PS" for kind in kinds)
    impossible = sum(len(match[0]) for match in _NOISE.finditer(text))
    return (broken + max(0.0, marks - len(text) / 4) + impossible) / len(text)


class Fluency:
    """The product of the guards, 0 … 1."""

    name = "fluency"

    def score(self, samples: Sequence[Sample], progress: Progress | None = None) -> Float32:
        """float32 [len(samples)]."""
        scores = [guards(sample.request, sample.response).fluency for sample in samples]
        return np.array(scores, np.float32)
