"""The length promise: `min ≤ words ≤ max`, kept by the decoder, not hoped for.

The command steers the model; this keeps the promise. End-of-text is held back
below the minimum. Inside the window the model may end. When it would run past
the maximum, the text is cut at the best word boundary of the window. Within a
sentence it may end only where no full stop is near (`Answer`). All
decisions look at the decoded text and count as `count_words` does, so they hold
for any tokenizer.
"""

from __future__ import annotations

import math
import re

from edge_slm_runtime.command import count_words
from edge_slm_runtime.words import NEVER_LAST, UNFINISHED_ANSWER

# `\S+` finds exactly the words of str.split: both follow str.isspace.
_WORD = re.compile(r"\S+")
_CLOSERS = "\"'”’»)]}"
SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？")
_CLAUSE_ENDS = (",", ";", ":", "–", "—", "，", "、", "；", "：")
SENTENCE_BREAK = re.compile(rf"[.!?…][{re.escape(_CLOSERS)}]*\s|[。！？]")
_SENTENCES = 10  # asked words from which on a text may be sentences, not a title
CLAUSE, SENTENCE = 2, 3  # of `ending`
_UNLIKELY = math.log(0.01)  # of an end that tells nothing
_LOOSE = "".join((*_CLAUSE_ENDS, "-", " "))


def tolerance(words: int) -> tuple[int, int]:
    """(min, max) words that count as `words`: ±10% or ±2, whichever is wider; min ≥ 1."""
    slack = max(2, math.floor(words * 0.1))
    return max(1, words - slack), words + slack


class LengthKeeper:
    """Keeps one answer inside `tolerance(words)`."""

    def __init__(self, words: int) -> None:
        self.words = words
        self.min, self.max = tolerance(words)
        self._end_log_prob: dict[int, float] = {}
        self._text, self._count = "", 0

    def may_end(self, text: str) -> bool:
        return self._words_of(text) >= self.min

    def note(self, text: str, end_log_prob: float) -> None:
        """Remembers how much the model wanted to end the text or a sentence here, for `cut`."""
        at = len(text.rstrip())
        for later in [key for key in self._end_log_prob if key > at]:  # of a text taken back
            del self._end_log_prob[later]
        self._end_log_prob[at] = max(end_log_prob, self._end_log_prob.get(at, -math.inf))

    def in_sentence(self, text: str) -> bool:
        """Whether a text that may well be sentences ends within one."""
        return self.words >= _SENTENCES and text != "" and ending(text) != SENTENCE

    def is_prose(self, text: str) -> bool:
        """Whether there is a sentence before the last one."""
        return SENTENCE_BREAK.search(text) is not None

    def lacks_stop(self, text: str) -> bool:
        """Whether prose ends with a word that may end a sentence, without a full stop."""
        open_quote = text.count('"') % 2 or text.count("“") > text.count("”")
        return self.is_prose(text) and ending(text) == 1 and not open_quote

    def breaks_off(self, text: str, piece: str) -> bool:
        """Whether `piece` would end a sentence right after a word such as "of" or "the"."""
        return piece.startswith(SENTENCE_ENDS) and _last_word(text) in NEVER_LAST

    def is_full(self, text: str) -> bool:
        """True when the next word would be, or already is, one too many."""
        words = self._words_of(text)
        return words > self.max or (words == self.max and text[-1].isspace())

    def sure(self, text: str) -> int:
        """How many characters no later `cut` can take back.

        A cut keeps at least `min` words and trims punctuation of the last one,
        so the words before number `min` are safe.
        """
        if not self.may_end(text):
            return len(text)
        for number, word in enumerate(_WORD.finditer(text), 1):
            if number == self.min:
                return word.start()
        return len(text)

    def _words_of(self, text: str) -> int:
        """Counted once for the questions of one token: a step leaves Python's caches cold."""
        if text is not self._text:
            self._text, self._count = text, count_words(text)
        return self._count

    def cut(self, text: str, *, finished: bool = True, least: int = 0) -> str:
        """The text up to the best word boundary of the window.

        Best: after a sentence, else anywhere but behind a dangling word; then where the model
        gave the end, or a full stop, the highest probability, of 1% and more; then after a
        clause; then nearest to the asked count. `finished=False` says that the last word may be
        torn: it is left out where the window allows. `least` characters stay.
        """
        best: tuple[tuple[int, float, int, int], str] | None = None
        found = list(_WORD.finditer(text))
        torn = not finished and not text[-1:].isspace() and found[-1:] and found[-1].end() > least
        if torn and len(found) > self.min:
            found.pop()
        for number, word in enumerate(found[: self.max], 1):
            if number < self.min or word.end() < least:
                continue
            kept = text[: word.end()]
            trimmed = kept[:least] + kept[least:].rstrip(_LOOSE)
            end = ending(trimmed)
            likely = max(self._end_log_prob.get(len(trimmed), _UNLIKELY), _UNLIKELY)
            rank = (
                min(end, 1) + (end == SENTENCE),
                round(likely, 1),
                ending(kept),
                -abs(number - self.words),
            )
            if best is None or rank > best[0]:
                best = rank, trimmed if count_words(trimmed) >= self.min else kept
        return best[1] if best else text


def ending(text: str) -> int:
    """3 after a sentence, 2 after a clause, 1 anywhere else (and of nothing), 0 after a dangling
    word."""
    if ends_sentence(text):
        return SENTENCE
    bare = text.rstrip(_CLOSERS)
    if bare.endswith(_CLAUSE_ENDS):
        return CLAUSE
    return 0 if _last_word(text) in UNFINISHED_ANSWER else 1


def ends_sentence(text: str) -> bool:
    return text.rstrip(_CLOSERS).endswith(SENTENCE_ENDS)


def _last_word(text: str) -> str:
    """In lower case; empty of a text without words."""
    return "".join(text.rsplit(maxsplit=1)[-1:]).lower()
