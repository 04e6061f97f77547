"""Phrases that an answer must have as they were given.

The model may write them itself. Those that are missing are inserted where it would end, or where
the remaining words or tokens are just enough for them; a text to be shown also where the model
opens a quotation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from edge_slm_runtime.command import count_words
from edge_slm_runtime.length import SENTENCE, ending

_GLUES = (", ", "; ", ". ", " ")  # none is a word
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
# What a quotation may follow as it is.
_LEADS = re.compile(r"\b(?:words?|text|line|phrase|slogan|title|reads?|says?|saying|reading)$")
_MARKS = (*",.;:!?…–—-(“，。、", '"')


def whole(phrase: str, flags: int = 0) -> re.Pattern[str]:
    """Finds a phrase that is no part of a longer word."""
    left = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    right = r"(?!\w)" if re.search(r"\w$", phrase) else ""
    return re.compile(left + re.escape(phrase) + right, flags)


def texts_to_show(request: str) -> tuple[str, ...]:
    """The quotations of a request for lettering; of one without, the request itself."""
    quoted = (a or b for a, b in QUOTED.findall(request))
    return tuple(filter(None, map(str.strip, quoted))) or (request.strip('"“” .'),)


class Keeps:
    """The phrases of one answer."""

    def __init__(
        self, phrases: Sequence[str], encode: Callable[[str], list[int]], texts: Sequence[str] = ()
    ) -> None:
        """encode: token ids of a text. texts: phrases that the answer is to show: it has them
        in quotation marks."""
        self._encode = encode
        self._texts = frozenset(texts)
        self._patterns = {phrase: whole(phrase) for phrase in dict.fromkeys(phrases)}
        self._tokens = {
            one: max(len(encode(f"{glue}{self._written(one)}")) for glue in _GLUES)
            for one in phrases
        }

    def _written(self, phrase: str, before: str | None = None) -> str:
        """A phrase as it is inserted after the text `before`; None gives the longest form."""
        if phrase not in self._texts:
            return phrase
        if before is not None and _LEADS.search(before):
            return f'"{phrase}"'
        if before == "" or (before and ending(before) == SENTENCE):
            return f'The text reads "{phrase}".'
        return f'with the text "{phrase}"'

    def missing(self, text: str) -> list[str]:
        return [one for one, pattern in self._patterns.items() if not pattern.search(text)]

    def end(self, text: str) -> int:
        """How many characters of the text have all phrases that it has."""
        found = (pattern.search(text) for pattern in self._patterns.values())
        return max((match.end() for match in found if match), default=0)

    def words(self, phrases: Sequence[str]) -> int:
        """How many words phrases add to a text."""
        return sum(count_words(self._written(one)) for one in phrases)

    def tokens(self, phrases: Sequence[str]) -> int:
        """How many tokens they take, at most."""
        return sum(self._tokens[one] for one in phrases)

    def quoted(self, text: str, phrases: Sequence[str], fits: Callable[[str], bool]) -> list[int]:
        """Token ids of the first phrase that is to be shown, with its closing quotation mark.
        Empty unless the text has just opened a quotation and the ids pass `fits`."""
        shown = next(filter(self._texts.__contains__, phrases), None)
        opened = text.endswith("“") or (text.endswith('"') and text.count('"') % 2)
        if shown is None or not opened:
            return []
        added = shown + ("”" if text.endswith("“") else '"')
        return self._encode(added) if fits(added) else []

    def can_wait(self, phrases: Sequence[str]) -> bool:
        """Whether the model may yet open a quotation for them."""
        return self._texts.issuperset(phrases)

    def ids(self, text: str, phrases: Sequence[str], fits: Callable[[str], bool]) -> list[int]:
        """Token ids that append the phrases to a text; empty when no separator passes `fits`."""
        for glue in _GLUES:
            lead = (" " if text.endswith(_MARKS) else glue) if text else ""
            if text[-1:].isspace():
                lead = lead.lstrip(" ,;.")
            if lead == ", " and _LEADS.search(text) and self._texts.issuperset(phrases):
                lead = " "
            written = [self._written(one, text) for one in phrases]
            if fits(added := lead + glue.join(written)):
                return self._encode(added)
        return []
