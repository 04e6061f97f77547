"""Shared by all composers: qualities, fitting a text to a length, joining its units.

Every composer takes (request, words, quality, rng) and returns a text of that many words,
within 2 where the request leaves room. Qualities: "best" contains the request and adds
details that fit it; "middling" contains its first part and adds details that fit anything;
"poor" is about something else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

from edge_slm.distill.teachers.grammar.lexicon import (
    articles,
    capital,
    least_words,
    lexicon,
    without_tail,
)
from edge_slm_runtime.command import count_words

Quality = Literal["best", "middling", "poor"]
Composer = Callable[[str, int, Quality, random.Random], str]
Pools = list[tuple[Sequence[str], float]]  # (entries, how early they are drawn), in text order

SLACK = 2  # words that a text may be longer or shorter than asked
ENDS = ("!", "?", "…", "。", ".")


def core(request: str) -> str:
    """The request without closing marks, which would be in the middle of the text."""
    return request.rstrip(" .,;:") or request


def cut(text: str, words: int) -> str:
    """The first words of `text`, if it is longer than `words` and SLACK."""
    parts = text.split()
    return text if len(parts) <= words + SLACK else without_tail(" ".join(parts[:words]))


def pack(
    pools: Pools,
    room: int,
    draw: Callable[[str], str],
    rng: random.Random,
    *,
    once: bool = False,
) -> list[str]:
    """Units drawn from the pools until `room` words are used, in the order of the pools.

    once: at most one unit of each pool.
    """
    chance = rng.random
    ranked: list[tuple[float, int, str]] = []
    for place, (entries, weight) in enumerate(pools):
        span = len(entries) / weight  # of a pool, about `weight` entries come per step
        ranked += [(chance() * span, place, entry) for entry in entries]
    ranked.sort()
    kept: list[tuple[int, str]] = []
    for _, place, entry in ranked:
        if room <= 0 or (kept and room <= SLACK and rng.random() < 0.5):
            break
        if least_words(entry) > room + SLACK or (once and any(place == p for p, _ in kept)):
            continue
        text = articles(draw(entry))
        if (length := count_words(text)) <= room + SLACK:
            kept.append((place, text))
            room -= length
    kept.sort(key=lambda unit: unit[0])
    return [text for _, text in kept]


def spare() -> tuple[Sequence[str], float]:
    """A pool that fits anything, for words that better pools leave over."""
    phrases = lexicon("looks")["generic"]["phrases"]
    return [f"{capital(phrase)}." for phrase in phrases if "[" not in phrase], 0.02


def commas(lead: str, units: Sequence[str]) -> str:
    if lead.endswith(ENDS) and units:
        return f"{lead} {capital(', '.join(units))}"
    return ", ".join([lead, *units])


def sentences(lead: str, units: Sequence[str]) -> str:
    first = capital(lead) + ("" if lead.endswith(ENDS) else ".")
    return " ".join([first, *units])
