"""tokenizer.json rebuilt from GGUF metadata, held against llama.cpp and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_slm_converters.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_name, tokenizer_json
from edge_slm_runtime.errors import CheckpointError

from .llama_server import LlamaServer
from .smollm2 import gguf_file

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

PIECES = (
    *(
        "hello",
        "World",
        "it's",
        "I'LL",
        "we've",
        "'",
        "''",
        "'s",
        "'S",
        "def f(x):\n    return x+1",
    ),
    *(" ", "  ", "\n", "\n\n\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\x07", "\x00", "\ufeff"),
    *("123", "4567890", "3.14", "1,000,000", "0x1F", "2024-01-02", "½", "²", "Ⅷ", "٣٤", "९", "𝟘"),
    *("東京", "naïve", "e\u0301", "русский", "עברית", "हिन्दी", "한국어", "ไทย", "ſ", "İ", "ﬁ", "𝒜"),
    *(
        "🦊🌲",
        "👩‍👩‍👧",
        "<|im_end|>",
        "<|im_start|>user",
        '{"a": [1,2]}',
        "`code`",
        "a_b",
        "http://a.b/c?d",
    ),
    *("—", "…", "!!!", "$5", "+=", "<=>", "~|^", "1st", "x2y", "_", "-"),
)


def texts(count: int, seed: int) -> list[str]:
    rng = Random(seed)
    return [
        "".join(rng.choice(PIECES) + rng.choice(("", " ", "")) for _ in range(rng.randint(1, 14)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    reader = gguf.GGUFReader(gguf_file())
    return {name: field.contents() for name, field in reader.fields.items()}


def rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(metadata)))
    tokenizer.encode_special_tokens = True
    return tokenizer


def write_empty_model(file: Path, metadata: dict[str, Any], pre: str | None) -> None:
    """The tokenizer of `metadata`, split as `pre` says, on a model of zeros."""
    writer = gguf.GGUFWriter(file, "llama")
    width = 32
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    tokens = metadata["tokenizer.ggml.tokens"]
    writer.add_token_list(tokens)
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), width), np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_ids_of_smollm2_are_those_of_llama_cpp(metadata: dict[str, Any]) -> None:
    server, ours = LlamaServer(gguf_file(), 64), rebuilt(metadata)
    for text in texts(600, seed=1):
        assert ours.encode(text, add_special_tokens=False).ids == server.tokenize(text), text


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, "llama3", None])
def test_every_way_of_splitting_is_that_of_llama_cpp(
    pre: str | None, metadata: dict[str, Any], tmp_path: Path
) -> None:
    write_empty_model(tmp_path / "m.gguf", metadata, pre)
    server = LlamaServer(tmp_path / "m.gguf", 64)
    other = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.pre"}
    ours = rebuilt(other | ({"tokenizer.ggml.pre": pre} if pre else {}))
    for text in texts(150, seed=2):
        assert ours.encode(text, add_special_tokens=False).ids == server.tokenize(text), text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_way_of_splitting_is_found_again_by_its_name(name: str) -> None:
    few = {"model": "gpt2", "pre": name, "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    few = {f"tokenizer.ggml.{key}": value for key, value in few.items()}
    built = Tokenizer.from_str(json.dumps(tokenizer_json(few)))
    assert pre_tokenizer_name(json.loads(built.to_str())) == name


def test_control_tokens_are_special_and_padding_is_left_out(metadata: dict[str, Any]) -> None:
    tokens = [*metadata["tokenizer.ggml.tokens"], "<user>", "[PAD0]"]
    types = [*metadata["tokenizer.ggml.token_type"], 4, 5]
    data = tokenizer_json(
        {**metadata, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    )
    added = {one["content"]: one["special"] for one in data["added_tokens"]}
    assert added["<|im_end|>"] is True
    assert added["<user>"] is False
    assert "[PAD0]" not in data["model"]["vocab"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokenizer.ggml.model": "llama"}, "SentencePiece"),
        ({"tokenizer.ggml.pre": "tekken"}, r"'tekken' cannot be converted.*smollm"),
        ({"tokenizer.ggml.merges": None}, "merges is missing"),
        ({"tokenizer.ggml.token_type": [1]}, "one number for each"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "twice"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(
    change: dict[str, Any], match: str, metadata: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=match):
        tokenizer_json(metadata | change)
