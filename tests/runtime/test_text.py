from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_slm_runtime import Command, CommandSchema, PromptForm
from edge_slm_runtime.errors import (
    ControlTokenInRequest,
    ManifestInvalid,
    RequestNotText,
    RequestTooLong,
)
from edge_slm_runtime.text import Detokenizer, StopMatcher, TextCodec

TEXTS = st.text(st.characters(exclude_categories=("Cs",)))


@given(text=TEXTS)
def test_decode_inverts_encode(codec: TextCodec, text: str) -> None:
    assert codec.decode(codec.encode(text)) == text


@given(text=TEXTS)
def test_pieces_are_whole_characters(codec: TextCodec, text: str) -> None:
    detokenizer = Detokenizer(codec)
    pieces = [detokenizer.push(token) for token in codec.encode(text)]
    assert "".join(pieces) == text
    for piece in pieces:
        piece.encode("utf-8")
        assert text.count("\ufffd") or "\ufffd" not in piece


@given(data=st.binary(max_size=24))
@example(data=b"\xed\xa0")  # half of a surrogate pair: two replacement characters at once
@example(data=b"\xf0\x9f\xa6")
def test_any_bytes_decode_as_they_come(codec: TextCodec, data: bytes) -> None:
    """As `bytes.decode` gives them, without an unfinished last character (at most 3 bytes)."""
    token_of = {codec.bytes_of(i): i for i in range(codec.size)}
    ids = [token_of[bytes([byte])] for byte in data]
    text = codec.decode(ids)
    detokenizer = Detokenizer(codec)
    assert "".join(map(detokenizer.push, ids)) == text
    lossy = data.decode("utf-8", errors="replace")
    ends = range(len(data), max(0, len(data) - 3) - 1, -1)
    assert any(text + data[end:].decode("utf-8", errors="replace") == lossy for end in ends)


def test_control_tokens_in_text_are_plain_text(codec: TextCodec, schema: CommandSchema) -> None:
    for token in schema.special_tokens():
        ids = codec.encode(token)
        assert codec.controls.isdisjoint(ids)
        assert codec.decode(ids) == token


def test_control_and_padding_ids_have_no_characters(codec: TextCodec) -> None:
    assert codec.decode([*codec.controls, codec.size, codec.size + 99]) == ""


def test_tokenizer_that_does_not_fit_the_schema(tiny_bundle: Path, tmp_path: Path) -> None:
    schema = CommandSchema.from_json(
        json.loads((tiny_bundle / "manifest.json").read_text())["command"]
    )
    data = json.loads((tiny_bundle / "tokenizer.json").read_text("utf-8"))
    data["added_tokens"][1]["content"] = "<|other|>"
    data["model"]["vocab"]["<|other|>"] = data["model"]["vocab"].pop("<|request|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ManifestInvalid, match="has no control token"):
        TextCodec(tmp_path / "tokenizer.json", PromptForm.commanded(schema))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ManifestInvalid, match="cannot be read"):
        TextCodec(tmp_path / "tokenizer.json", PromptForm.commanded(schema))


@pytest.fixture
def tampered(
    tiny_bundle: Path, schema: CommandSchema, tmp_path: Path
) -> Callable[[Callable[[dict[str, Any]], object]], TextCodec]:
    def load(change: Callable[[dict[str, Any]], object]) -> TextCodec:
        data = json.loads((tiny_bundle / "tokenizer.json").read_text("utf-8"))
        change(data)
        (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
        return TextCodec(tmp_path / "tokenizer.json", PromptForm.commanded(schema))

    return load


Tampered = Callable[[Callable[[dict[str, Any]], object]], TextCodec]


def test_a_tokenizer_neither_cuts_nor_pads_a_request(codec: TextCodec, tampered: Tampered) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"}
    text = "a b zzz c d e f g"
    assert tampered(lambda d: d.update(truncation=cut)).encode(text) == codec.encode(text)
    assert tampered(lambda d: d.update(padding=pad)).encode(text) == codec.encode(text)


def test_a_tokenizer_that_would_change_requests_is_refused(tampered: Tampered) -> None:
    with pytest.raises(ManifestInvalid, match="normalizer"):
        tampered(lambda d: d.update(normalizer={"type": "NFKC"}))
    composed = tampered(lambda d: d.update(normalizer={"type": "NFC"}))  # Qwen2's
    assert composed.decode(composed.encode("cafe\u0301")) == "caf\u00e9"
    with pytest.raises(ManifestInvalid, match="must be special"):
        tampered(lambda d: d["added_tokens"][0].update(special=False))
    with pytest.raises(ManifestInvalid, match="added token of 100000 characters"):  # for minutes
        tampered(lambda d: d["added_tokens"][1].update(content="a" * 100_000))
    with pytest.raises(ManifestInvalid, match="at random"):
        tampered(lambda d: d["model"].update(dropout=0.5))
    with pytest.raises(ManifestInvalid, match="cannot be read"):  # tokenizers panics
        tampered(lambda d: d["model"].update(continuing_subword_prefix="not of byte-level BPE"))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(pattern: dict[str, str], behavior: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, BYTES]}


def without(char: str) -> Callable[[dict[str, Any]], None]:
    """A vocabulary without the tokens of a character of the byte alphabet."""

    def change(data: dict[str, Any]) -> None:
        model = data["model"]
        vocab = sorted((t for t in model["vocab"] if char not in t), key=model["vocab"].get)
        model["vocab"] = {token: i for i, token in enumerate(vocab)}
        model["merges"] = [m for m in model["merges"] if char not in "".join(m)]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(chr(0xF0)), "no token for byte 0xf0"),  # the first one of emoji
        (without("s"), "no token for byte 0x73"),
        (lambda d: d.update(pre_tokenizer=None), "loses or changes"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "loses or changes"),
        (lambda d: d["model"].update(end_of_word_suffix="</w>"), "loses or changes"),
        (lambda d: d.update(pre_tokenizer=split({"String": ","}, "Removed")), "loses or changes"),
        (
            lambda d: d.update(pre_tokenizer=split({"Regex": r"(a+)+$"}, "Isolated")),
            "may take for ever",
        ),
        (
            lambda d: d.update(pre_tokenizer=split({"Regex": r"(?:a|a|aa)+$"}, "Isolated")),
            "may take for ever",
        ),
        (lambda d: d["model"]["vocab"].update(b=d["model"]["vocab"]["a"]), "gaps"),
        (lambda d: d["model"]["vocab"].update(a=5000), "gaps"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(
    tampered: Tampered, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ManifestInvalid, match=message):
        tampered(change)


def test_a_word_that_a_tokenizer_loses_is_refused(tampered: Tampered) -> None:
    codec = tampered(lambda d: d.update(pre_tokenizer=split({"String": "cabin"}, "Removed")))
    assert codec.decode(codec.encode("a cosy boat")) == "a cosy boat"
    with pytest.raises(RequestNotText, match="no tokens for some characters"):
        codec.encode("a cosy cabin")


def test_a_special_token_that_was_added_is_never_an_answer(tampered: Tampered) -> None:
    def add(data: dict[str, Any]) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": len(data["model"]["vocab"]), "content": "<|pad|>", "special": True}
        data["added_tokens"].append(token | flags)

    codec = tampered(add)
    assert codec.bytes_of(codec.size - 1) == b""
    assert any(ids.start <= codec.size - 1 < ids.stop for ids in codec.never(codec.size))


def test_a_huge_request_is_refused_before_it_is_encoded(codec: TextCodec) -> None:
    bounded = TextCodec((codec._tokenizer.to_str()).encode(), codec.form, positions=128)
    with pytest.raises(RequestTooLong, match="1000000 characters, more than the model's 128"):
        bounded.prompt("a" * 1_000_000, Command())
    assert bounded.prompt("a cosy cabin", Command()) == codec.prompt("a cosy cabin", Command())


def test_merges_that_spell_a_control_token(tampered: Tampered) -> None:
    def spell(data: dict[str, Any]) -> None:
        merges, spelt = [], "<"
        for char in "|end|>":
            merges.append([spelt, char])
            spelt += char
            data["model"]["vocab"].setdefault(spelt, len(data["model"]["vocab"]))
        data["model"]["merges"] = merges
        data["pre_tokenizer"].update(use_regex=False)

    with pytest.raises(ControlTokenInRequest):
        tampered(spell).encode("<|end|>")


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
)
def test_stop_sequences_across_any_pieces(pieces: list[str], stops: list[str]) -> None:
    """Piece by piece finds the same place as looking at all prefixes, and what was
    not held back never belongs to a stop sequence."""
    matcher, text, shown = StopMatcher(stops), "", 0
    for piece in pieces:
        text += piece
        at = matcher.find(text, len(piece))
        expected = min((i for s in stops if (i := text.find(s)) >= 0), default=None)
        assert at == expected
        if at is not None:
            assert shown <= at
            return
        shown = max(shown, len(text) - matcher.held(text))
