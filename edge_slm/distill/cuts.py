"""Where a text may end, and how."""

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
    return [", ".join(phrases[:n]) for n in range(2, len(phrases))] if _is_list(text) else []


def sentence_ends(text: str) -> list[int]:
    """How many characters each sentence and those before it have; the last one's: all."""
    return [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]


def with_full_stop(text: str) -> str:
    """The text with a full stop, if it is a sentence that has no mark at its end."""
    if _is_list(text) or not (text[-1:].isalnum() or text[-1:] in "\"'”’)"):
        return text
    return text if text.rstrip("\"'”’)")[-1:] in ".!?" else f"{text}."


def _is_list(text: str) -> bool:
    """Whether it is a list of short phrases."""
    _, *phrases = text.split(", ")
    return len(phrases) > 2 and max(map(count_words, phrases)) <= _LISTED
