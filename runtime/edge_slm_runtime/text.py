"""Text in and out: token ids of a request, and text from token ids as they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import ControlTokenInRequest, ManifestInvalid


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
    """The bundle's byte-level BPE tokenizer.

    Control tokens have ids only through the command schema: in a request they
    are plain text, and in decoded text they have no characters.
    """

    def __init__(self, path: Path, schema: CommandSchema) -> None:
        """Raises ManifestInvalid when the tokenizer and the schema do not fit."""
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except BaseException as error:  # tokenizers raises bare Exception, or panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ManifestInvalid(f"{path.name} cannot be read: {error}") from None
        if self._tokenizer.normalizer is not None:
            raise ManifestInvalid(f"{path.name} has a normalizer; it would change requests")
        if getattr(self._tokenizer.model, "dropout", None):
            raise ManifestInvalid(f"{path.name} has dropout; it would split requests at random")
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size: int = self._tokenizer.get_vocab_size()
        control, added = schema.special_tokens(), self._tokenizer.get_added_tokens_decoder()
        for i, token in enumerate(control):
            if self._tokenizer.token_to_id(token) != i:
                raise ManifestInvalid(f"{path.name}: control token {token} must have id {i}")
            if i in added and not added[i].special:
                raise ManifestInvalid(f"{path.name}: control token {token} must be special")
        self.controls = len(control)
        alphabet = _byte_of_char()
        self._bytes = [b""] * self.controls
        for i in range(self.controls, self.size):
            token = self._tokenizer.id_to_token(i) or ""
            if not all(char in alphabet for char in token):
                raise ManifestInvalid(f"{path.name} is not a byte-level BPE (token {i})")
            self._bytes.append(bytes(alphabet[char] for char in token))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text; control tokens in it are only characters.

        Raises ControlTokenInRequest when the tokenizer finds one all the same.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if min(ids, default=self.controls) < self.controls:
            raise ControlTokenInRequest("the tokenizer reads a control token in the request")
        return ids

    def bytes_of(self, token: int) -> bytes:
        """The bytes a token stands for; none for control tokens and padding ids."""
        return self._bytes[token] if token < self.size else b""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; an unfinished last character (see Detokenizer) is left out."""
        detokenizer = Detokenizer(self)
        return "".join(detokenizer.push(token) for token in ids)


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


class StopMatcher:
    """Finds the first stop sequence in growing text, and holds back what may become one."""

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
