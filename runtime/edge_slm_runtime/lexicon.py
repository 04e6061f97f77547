"""Answers of known words alone: those of the bundle's lexicon, and those of their own request.

Small models glue tokens into words that do not exist ("theemetery", "mountainious"). A lexicon is
the list of words that training saw, `words.txt` of a bundle. As long as it begins one of them a
word may be written, whatever tokens spell it; it may end where it is one.

Words are runs of Latin letters, those of ASCII in lower case: hyphens and apostrophes end a word
as spaces do, so that "fox's" is "fox" and "s". Digits, underscores and other scripts end it too,
and what follows them up to the next space or mark is free.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import lt

from edge_slm_runtime.keywords import words_of
from edge_slm_runtime.text import TextCodec

LONGEST = 64  # bytes of a word
_LARGEST = 1 << 20  # bytes of a file
_FILE = re.compile(rb"(?:[a-z\x80-\xbf\xc3-\xc9]{1,%d}\n)+" % LONGEST)  # up to U+024F
# Other characters, the last of which may lack bytes: letters of other scripts, or by the first
# byte punctuation and symbols (nearly all of them).
_OTHER = re.compile(rb"(?:([\xca-\xe1\xe3-\xef])|[\xc2\xe2\xf0-\xf4])[\x80-\xbf]*")
_INNER = {bytes([byte]) for byte in range(0x80, 0xC0)}  # which begin no character
_SPACE, _FREE = b" ", b"0"
_DIGITS = b"0123456789_"
_CLASSES = bytes(
    byte if byte >= 0x80 or chr(byte).isalpha() else (_FREE if byte in _DIGITS else _SPACE)[0]
    for byte in bytes(range(256)).lower()
)


def words_in(text: str) -> Iterator[bytes]:
    """The words of a text as a lexicon has them, in UTF-8."""
    for part in _spelled(text.encode()).split():
        if word := part.partition(_FREE)[0]:
            yield word


def read_lexicon(content: bytes) -> list[bytes]:
    """The words of a file. Raises ValueError for what is not one."""
    if len(content) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST >> 20} MiB")
    if not _FILE.fullmatch(content):
        raise ValueError(f"not each line is a lower-case word of at most {LONGEST} bytes")
    content.decode()
    words = content.split()
    if not all(map(lt, words, islice(words, 1, None))):
        raise ValueError("its words are not sorted, each once")
    return words


class KnownWords:
    """The words that one answer may have."""

    def __init__(self, lexicon: Sequence[bytes], codec: TextCodec, texts: Iterable[str]) -> None:
        """lexicon: sorted. texts: their words are known too, and the plurals of these."""
        own = {word for text in texts for word in words_in(f"{text} {' '.join(words_of(text))}")}
        own |= {word + more for word in own for more in (b"s", b"es")}
        self._lexicon, self._own = lexicon, sorted(own)
        self._last = "", b""
        self._bytes_of, self._ends = codec.bytes_of, codec.ends

    def refusal(self, text: str, pending: bytes, *, whole: bool = False) -> Callable[[int], bool]:
        """Whether a token must not follow `text` and the bytes `pending` of its next character:
        where it begins or ends a word that is not known, or breaks a character. whole: also
        where it leaves part of a word, or neither a word nor one before it."""
        start, inside = self._begun(text) + pending, pending != b""

        def refuses(token: int) -> bool:
            more = _SPACE if token in self._ends else self._bytes_of(token)
            if (more[:1] in _INNER) is not inside:
                return True
            *ended, last = _spelled(start + more).split(_SPACE)
            fits = start + last != b"" and self._may_end(last) if whole else self._may_go_on(last)
            return not (fits and all(map(self._may_end, ended)))

        return refuses

    def begun(self, text: str) -> int:
        """How many letters the word has that a text ends in, 0 without one."""
        return len(self._begun(text).decode())

    def without_torn(self, text: str, kept: int = 0) -> str:
        """The text without a last word that must go on, of which the first `kept` characters
        stay."""
        begun = self._begun(text)
        if self._may_end(begun):
            return text
        return text[: max(kept, len(text) - len(begun.decode()))].rstrip()

    def _begun(self, text: str) -> bytes:
        """The letters of the word that a text ends in; _FREE where none could go on with them, as
        after a step for which there was nothing else. Asked for the same text again and again."""
        last, part = self._last
        if text != last:
            part = _spelled(text[-LONGEST:].encode()).rpartition(_SPACE)[2]
            part = part if _FREE not in part and self._may_go_on(part) else _FREE
            self._last = text, part
        return part

    def _may_end(self, part: bytes) -> bool:
        word = part.partition(_FREE)[0]
        return not word or word in (_at(self._lexicon, word), _at(self._own, word))

    def _may_go_on(self, part: bytes) -> bool:
        if _FREE in part:
            return self._may_end(part)
        return _at(self._lexicon, part).startswith(part) or _at(self._own, part).startswith(part)


def _spelled(text: bytes) -> bytes:
    """UTF-8 as its words: letters in lower case, _FREE before a part that is, and spaces."""
    if not text.isascii():
        text = _OTHER.sub(lambda found: _FREE if found[1] else _SPACE, text)
    return text.translate(_CLASSES)


def _at(words: Sequence[bytes], word: bytes) -> bytes:
    """The first of the sorted `words` that is not before `word`; empty when none is."""
    at = bisect_left(words, word)
    return words[at] if at < len(words) else b""
