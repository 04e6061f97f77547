"""Where a text may end early."""

from __future__ import annotations

import re

from edge_slm_runtime.command import count_words

_LISTED = 5  # words of a phrase in a list, at most
_CLAUSE_END = re.compile(r"(?:[,;:]|(?<=[.!?]))(?=\s)")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*(?=\s+[A-Z\"'“‘(])")


def clause_cuts(text: str) -> list[str]:
    """All proper prefixes of `text` that end at a clause end, shortest first.

    A full stop is kept: without it a complete sentence would look truncated.
    """
    return [text[: match.start()].rstrip() for match in _CLAUSE_END.finditer(text)]


def whole_cuts(text: str) -> list[str]:
    """Proper prefixes of `text` that are whole: sentences, or a part of a list of phrases."""
    cuts = [text[: match.end()].rstrip() for match in _SENTENCE_END.finditer(text)]
    if cuts or text[-1:] in ".!?":
        return cuts
    phrases = text.split(", ")
    longest = max(count_words(phrase) for phrase in phrases[1:]) if phrases[1:] else 0
    if len(phrases) < 4 or longest > _LISTED:
        return []
    return [", ".join(phrases[:n]) for n in range(2, len(phrases))]
