"""Text in and out: token ids of a request, and text from token ids as they come."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

from tokenizers import Tokenizer
from tokenizers.normalizers import NFC

from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import (
    ControlTokenInRequest,
    ManifestInvalid,
    RequestNotText,
    RequestTooLong,
)
from edge_slm_runtime.prompt import PromptForm

_NAME = "tokenizer.json"
_FRAMES = 256  # texts around requests whose ids are kept
_SHRINKS = 4  # NFC makes a text shorter by less than this factor
# Bytes of texts in UTF-8. Some models lack control characters and what begins characters of
# unassigned planes; a request that has them is refused.
_NEEDED = {*b"\t\n", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}
_LONGEST_ADDED = 512  # characters
# What tokenizers are apt to change: spaces, punctuation, digits, case, marks, line ends.
_PROBES = (
    "".join(map(chr, range(32, 127))),
    "  two  spaces, a tab\t, lines\n\nand\r\nends ",
    "It's 3.14, isn't it? (Yes; 12,345,678!) #tag @name <lora:ink:0.7> __x__ {a|b}",
    "früh am Morgen, naïve façade, ÇA, straße, 東京の夜景, привет, שלום, नमस्ते, 한국",
    "🦊🌲 👩‍🚀 e\u0301 \u00a0 \ufb01 ﷺ ａｂｃ İı \u2028 \ufeff \u200b end",
)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte alphabet, inverted: printable bytes stand for themselves,
    the others for the characters from U+0100 on (openai/gpt-2, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


class TextCodec:
    """The bundle's byte-level BPE tokenizer, and its prompts.

    Control tokens are those that the tokenizer calls special, and those of the prompt form.
    They have ids only through the form: in a request they are plain text, and in decoded
    text they have no characters.
    """

    def __init__(
        self, tokenizer: Path | bytes, form: PromptForm, positions: int | None = None
    ) -> None:
        """tokenizer: tokenizer.json, its path or contents. positions: the model's context;
        what cannot fit into it is not encoded.

        Raises ManifestInvalid when the tokenizer and the form do not fit, or when text does
        not survive the tokenizer."""
        self.form, self._positions = form, positions
        self._tokenizer = open_tokenizer(tokenizer)
        self.size: int = self._tokenizer.get_vocab_size()
        added = self._tokenizer.get_added_tokens_decoder()
        self._ids: dict[str, int] = {
            token.content: i for i, token in added.items() if token.special
        }
        for token in form.tokens:
            i = self._tokenizer.token_to_id(token)
            if i is None:
                raise ManifestInvalid(f"{_NAME} has no control token {token}")
            if i in added and not added[i].special:
                raise ManifestInvalid(f"{_NAME}: control token {token} must be special")
            self._ids[token] = i
        self.ends: tuple[int, ...] = tuple(self._ids[token] for token in form.ends)
        self.controls = frozenset(self._ids.values())
        spelled = sorted(self._ids, key=len, reverse=True)  # the longest that fits is meant
        self._control = re.compile(f"({'|'.join(map(re.escape, spelled))})")
        self._marks = {*form.ends, *self._control.findall(form.before + form.after)}
        self._around = lru_cache(_FRAMES)(self._read_around)
        self._bytes = self._bytes_of_all({i: one.content for i, one in added.items()})
        self._longest = max(map(len, self._bytes))
        lost = _NEEDED - {one[0] for one in self._bytes if len(one) == 1}
        if lost:
            raise ManifestInvalid(f"{_NAME} has no token for byte {min(lost):#04x}")
        self.full_stop = self._bytes.index(b".")  # the token
        if changed := [text for text in _PROBES if not self._survives(text, self._encode(text))]:
            raise ManifestInvalid(f"{_NAME} loses or changes some of {changed[0]!r}")

    def _bytes_of_all(self, added: Mapping[int, str]) -> list[bytes]:
        """Of each token; raises ManifestInvalid where its characters stand for no bytes."""
        alphabet, found = _byte_of_char(), [b""] * self.size
        for token, i in self._tokenizer.get_vocab().items():
            if i >= self.size:
                raise ManifestInvalid(f"{_NAME}: token ids have gaps")
            if i in self.controls:
                continue
            if i in added:
                found[i] = added[i].encode()
                continue
            try:
                found[i] = bytes([alphabet[char] for char in token])
            except KeyError:
                raise ManifestInvalid(f"{_NAME} is not a byte-level BPE (token {i})") from None
        if not all(one or i in self.controls for i, one in enumerate(found)):
            raise ManifestInvalid(f"{_NAME}: token ids have gaps")
        return found

    def prompt(self, request: str, command: Command) -> list[int]:
        """Ids of a request under its form, and under a command where the form has them.

        Raises as `PromptForm.clean` and `Axis.value_of`, RequestTooLong, RequestNotText.
        """
        text = self.form.clean(request, command)
        if self._positions is not None:
            self._refuse_huge(text)
        if smuggled := next((mark for mark in self._marks if mark in text), None):
            raise ControlTokenInRequest(f"the request holds the control token {smuggled!r}")
        before, left, right, after = self._around(*self.form.around(command))
        return [*before, *self.encode(left + text + right), *after]

    def control(self, token: str) -> int:
        """Id of a control token of the form."""
        return self._ids[token]

    def _refuse_huge(self, text: str) -> None:
        """What has more bytes than the longest tokens could hold: encoding takes hundreds of
        times the memory of the text."""
        shrinks = _SHRINKS if self._tokenizer.normalizer else 1
        assert self._positions is not None
        if len(text) > self._positions * self._longest * shrinks:
            raise RequestTooLong(
                f"the request has {len(text)} characters, more than the model's "
                f"{self._positions} positions can hold",
                "shorten the request",
            )

    def _read_around(self, before: str, after: str) -> tuple[list[int], str, str, list[int]]:
        """Ids up to the last control token before a request, the text from there to it, the
        text from it to the next control token, and the ids from there on.

        Text is split in front of and behind control tokens before anything else, so the
        request is to be encoded together with the text that it touches.
        """
        *front, left = self._control.split(before)
        right, *back = self._control.split(after)
        return self._read(front), left, right, self._read(back)

    def _read(self, parts: Sequence[str]) -> list[int]:
        return [
            i
            for part in parts
            for i in ([self._ids[part]] if part in self._ids else self.encode(part))
        ]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text; control tokens in it are only characters.

        Raises ControlTokenInRequest when the tokenizer finds one all the same, RequestNotText
        when it loses or changes some of the text.
        """
        ids = self._encode(text)
        if not self.controls.isdisjoint(ids):
            raise ControlTokenInRequest("the tokenizer reads a control token in the request")
        if not self._survives(text, ids):
            raise RequestNotText("the model has no tokens for some characters of the request")
        return ids

    def _encode(self, text: str) -> list[int]:
        with _panics("cannot encode a text"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _survives(self, text: str, ids: Sequence[int]) -> bool:
        """Whether `ids` spell the text, but for NFC where the tokenizer normalises."""
        found = b"".join([self._bytes[i] for i in ids])
        if found == text.encode() or self._tokenizer.normalizer is None:
            return found == text.encode()
        return normalize("NFC", found.decode("utf-8", "replace")) == normalize("NFC", text)

    def never(self, vocab_size: int) -> list[slice]:
        """Ranges of the ids that an answer never has and that do not end it: other control
        tokens, and the padding of the embedding to `vocab_size`."""
        ids = sorted({*self.controls, *range(self.size, vocab_size)} - {*self.ends})
        starts = [i for i, before in zip(ids, [-2, *ids], strict=False) if i != before + 1]
        ends = [i + 1 for i, after in zip(ids, [*ids[1:], -1], strict=True) if after != i + 1]
        return [slice(*both) for both in zip(starts, ends, strict=True)]

    def bytes_of(self, token: int) -> bytes:
        """The bytes a token stands for; none for control tokens and padding ids."""
        return self._bytes[token] if token < self.size else b""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; an unfinished last character (see Detokenizer) is left out."""
        detokenizer = Detokenizer(self)
        return "".join(detokenizer.push(token) for token in ids)


def open_tokenizer(source: Path | bytes) -> Tokenizer:
    """A tokenizer that encodes text as it is. Raises ManifestInvalid."""
    with _panics("cannot be read"):
        content = source if isinstance(source, bytes) else source.read_bytes()
    _refuse_long(content)
    with _panics("cannot be read"):
        tokenizer = Tokenizer.from_buffer(content)
    if not isinstance(tokenizer.normalizer, NFC | None):  # NFC is the same text
        raise ManifestInvalid(f"{_NAME} has a normalizer; it would change requests")
    if getattr(tokenizer.model, "dropout", None):
        raise ManifestInvalid(f"{_NAME} has dropout; it would split requests at random")
    if any(map(_is_slow, _patterns(tokenizer))):
        raise ManifestInvalid(f"{_NAME} splits by a pattern that may take for ever")
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _refuse_long(content: bytes) -> None:
    """Raises ManifestInvalid for an added token of a size for which the library computes for
    minutes. What it cannot read itself, it says."""
    try:
        longest = max(len(token["content"]) for token in json.loads(content)["added_tokens"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return
    if longest > _LONGEST_ADDED:
        raise ManifestInvalid(
            f"{_NAME} has an added token of {longest} characters (allowed: {_LONGEST_ADDED})"
        )


@contextmanager
def _panics(what: str) -> Iterator[None]:
    """Raises ManifestInvalid for what tokenizers raises: bare Exception, or panics."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ManifestInvalid(f"{_NAME} {what}: {error}") from None


def _patterns(tokenizer: Tokenizer) -> Iterator[str]:
    """The regular expressions by which text is split before the BPE."""
    if tokenizer.pre_tokenizer is None:
        return
    steps: list[Any] = [json.loads(tokenizer.pre_tokenizer.__getstate__())]
    while steps:
        step = steps.pop()
        steps += step.get("pretokenizers", [])
        if pattern := step.get("pattern", {}).get("Regex"):
            yield pattern


def _is_slow(pattern: str) -> bool:
    """Whether matching may take longer than the square of a text: a repeated group, or three
    repetitions one after the other. Those of known tokenizers have none."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    repeats = [len(re.findall(r"[*+]|\{\d*,\}", part)) for part in bare.split("|")]
    return bool(re.search(r"\)[*+{]", bare)) or max(repeats) > 2


class Detokenizer:
    """Incremental decoding: a character is returned with its last byte.

    The pieces together are `bytes.decode("utf-8", "replace")` of all bytes, except that
    up to 3 bytes at the end are held back while they may begin a character.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._codec.bytes_of(token))

    def peek(self, token: int) -> str:
        """What `push` would return."""
        state = self.state
        piece = self.push(token)
        self.state = state
        return piece

    @property
    def state(self) -> tuple[bytes, int]:
        """The bytes that are held back; may be set to an earlier one."""
        return self._decoder.getstate()

    @state.setter
    def state(self, state: tuple[bytes, int]) -> None:
        self._decoder.setstate(state)


class StopMatcher:
    """Finds the first stop sequence in growing text, and holds back a beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)

    def find(self, text: str, new: int) -> int | None:
        """Where the earliest stop sequence begins, if the last `new` characters complete one."""
        if not self._stops:
            return None
        start = max(0, len(text) - new - self._longest + 1)
        found = [at for stop in self._stops if (at := text.find(stop, start)) >= 0]
        return min(found, default=None)

    def held(self, text: str) -> int:
        """Length of the longest tail of `text` that begins a stop sequence."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
