"""Words said twice in a row ("bold, bold", "calm and calm"), and items or sentences said twice.

Small models fall into these loops long before a run of several tokens comes again, which the
n-gram block sees. A request that doubles a word itself may have it doubled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from edge_slm_runtime.length import SENTENCE_BREAK, SENTENCE_ENDS

_DOUBLED = re.compile(r"\b(\w+)(?:,? (?:and|or|&))?,? (?=\1\b)", re.IGNORECASE)
_LAST_WORD = re.compile(r"(?<!\w)(\w+)(?:,? (?:and|or|&)|,)?$")
_LETTERS = re.compile(r"(?<!\w)[^\W\d_]+$")
_TAIL = 48  # characters that may hold the last word and what joins it to the next
# English doubles these.
_IDIOMS = frozenset("again and blah had less more never on over round so that up very".split())
_SHORT = 3  # letters: "as a" is no plural
_ITEM = re.compile(r"[^,.;:!?…。！？\n]+")
_MARKS = (",", ";", ":", *SENTENCE_ENDS)


class Repeats:
    """What an answer to `request` may not say next."""

    def __init__(self, request: str) -> None:
        self._free = _IDIOMS | {match[1].lower() for match in _DOUBLED.finditer(request)}

    def refuses(self, text: str, piece: str) -> bool:
        """Whether `piece` says again what the text has just said: its last word, also in the
        plural, or, by ending it, an item of a list or a sentence."""
        if piece.startswith(_MARKS):
            if piece.startswith(SENTENCE_ENDS):
                return self._is_said(text)
            return piece[0] == "," and self.refuses_end(text)
        tail = text[-_TAIL:]
        if piece[:1] != " ":  # it goes on with a word
            begun = _LETTERS.search(tail)
            if begun is None:
                return False
            tail, piece = tail[: begun.start()].rstrip(" "), f" {begun[0]}{piece}"
        word = piece[1:].lower()
        if not word.isalpha() or word in self._free:
            return False
        last = _LAST_WORD.search(tail)
        return last is not None and _singular(last[1].lower()) == _singular(word)

    def refuses_end(self, text: str) -> bool:
        """Whether the text ends in an item of a list that it has listed before."""
        if "," not in text or text.endswith(_MARKS):
            return False
        items = list(_items(text))
        return items[-1:] != [] and items[-1] in items[:-1]

    def _is_said(self, text: str) -> bool:
        """Whether the last sentence is an earlier one, or an item of it."""
        *before, last = SENTENCE_BREAK.split(text)
        return bool(before) and last.strip().lower() in _items(". ".join(before))


def _singular(word: str) -> str:
    return word.removesuffix("s") if len(word) > _SHORT else word


def _items(text: str) -> Iterator[str]:
    for match in _ITEM.finditer(text):
        if item := match[0].strip().lower():
            yield item
