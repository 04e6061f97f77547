"""Words and phrases that an answer must not have.

Compared are sequences of words and punctuation marks, whatever their case and the white space
between them, so `art` is found in "Art-deco" and not in "artist", whichever tokens of a model
they are written in. Whether "art" at the end of a text is a word is known with the next
character only: until then it is open.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_UNIT = re.compile(r"\w+|[^\w\s]")


def units(text: str) -> tuple[str, ...]:
    """Words and punctuation marks, without their case."""
    return tuple(one.casefold() for one in _UNIT.findall(text))


class Bans:
    """Finds banned phrases at the end of a text that grows."""

    def __init__(self, phrases: Sequence[str]) -> None:
        """Raises ValueError, its argument a phrase that has no word and no mark."""
        self._by_end: dict[str, list[tuple[str, ...]]] = {}  # last unit → phrases
        for phrase in phrases:
            if not (parts := units(phrase)):
                raise ValueError(phrase)
            self._by_end.setdefault(parts[-1], []).append(parts)

    def closed(self, text: str, old: int) -> int | None:
        """Where a phrase ends that the characters from `old` on make certain, if one does."""
        for unit in _UNIT.finditer(text, _word_start(text, old)):
            end = unit.end()
            word = is_word(text[end - 1])
            if end < old + (not word) or (word and end == len(text)):
                continue
            if self._ends(text, end, unit[0]):
                return end
        return None

    def open(self, text: str) -> bool:
        """Whether the text ends in a phrase that a longer last word would make another."""
        start = _word_start(text, len(text))
        return start < len(text) and self._ends(text, len(text), text[start:])

    def without_open(self, text: str, kept: int = 0) -> str:
        """The text without the last words that leave it open, of which the first `kept`
        characters stay."""
        while len(text) > kept and self.open(text):
            text = text[: max(kept, _word_start(text, len(text)))].rstrip()
        return text

    def _ends(self, text: str, end: int, unit: str) -> bool:
        if phrases := self._by_end.get(unit.casefold()):
            before = units(text[:end])
            return any(before[-len(phrase) :] == phrase for phrase in phrases)
        return False


# Of a list of thousands, once for the requests of an app rather than for each of them.
bans_of = lru_cache(maxsize=8)(Bans)


def _word_start(text: str, end: int) -> int:
    """Where the word begins that ends at `end`; `end` when none does."""
    while end and is_word(text[end - 1]):
        end -= 1
    return end


def is_word(char: str) -> bool:
    """Whether a character is part of a word; False for none."""
    return char.isalnum() or char == "_"
