"""A byte-level BPE tokenizer between tokenizer.json and the metadata of a GGUF file.

llama.cpp knows pre-tokenizers by name only; PRE_TOKENIZERS has those that are supported, as
steps of the `tokenizers` library. A file without a name was written before there were names:
llama.cpp splits its texts in the way called "default", and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_slm_runtime.errors import CheckpointError

Json = dict[str, Any]
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of GGUF
KEYS = "tokenizer.ggml"

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
_LLAMA3 = (  # digits in groups of at most {}
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{DIGITS}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> Json:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _byte_level(*, use_regex: bool) -> Json:
    """use_regex: split as GPT-2 does; else map bytes to characters only."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


# Name → steps. Of several tokenizers of one way of splitting, the first name is written.
PRE_TOKENIZERS: Mapping[str, Sequence[Json]] = {
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "llama-bpe": [_split(_LLAMA3.replace("{DIGITS}", "{1,3}")), _byte_level(use_regex=False)],
    "qwen2": [_split(_LLAMA3.replace("{DIGITS}", "")), _byte_level(use_regex=False)],
    "default": [
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(_GPT2),
        _split(r"\p{N}+"),
        _split(r"[0-9][0-9][0-9]"),
        _byte_level(use_regex=False),
    ],
}
# Names of llama.cpp for the same splitting.
SAME = {
    "phi-2": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
}


def tokenizer_json(metadata: Mapping[str, Any]) -> Json:
    """tokenizer.json of a GGUF file. Raises CheckpointError for a tokenizer of another kind."""
    if (model := metadata.get(f"{KEYS}.model")) != "gpt2":
        raise CheckpointError(
            f"GGUF: tokenizer.ggml.model {model!r} cannot be converted",
            "only 'gpt2' can, a byte-level BPE; 'llama' is SentencePiece",
        )
    name = metadata.get(f"{KEYS}.pre", "default")
    if not isinstance(name, str) or (known := SAME.get(name, name)) not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"GGUF: tokenizer.ggml.pre {name!r} cannot be converted",
            f"known: {', '.join([*PRE_TOKENIZERS, *SAME])}",
        )
    tokens, merges = _strings(metadata, "tokens"), _strings(metadata, "merges")
    types = metadata.get(f"{KEYS}.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError("GGUF: tokenizer.ggml.token_type is not one number for each token")
    while types and types[-1] == UNUSED:  # padding of the vocabulary
        del tokens[-1], types[-1]
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("GGUF: tokenizer.ggml.tokens names a token twice")
    steps = PRE_TOKENIZERS[known]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, token, special=kind != USER_DEFINED)
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind != NORMAL
        ],
        "normalizer": None,
        "pre_tokenizer": steps[0]
        if len(steps) == 1
        else {"type": "Sequence", "pretokenizers": list(steps)},
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": known == "llama-bpe",  # as llama.cpp does for it
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def pre_tokenizer_name(tokenizer: Json) -> str:
    """llama.cpp's name for how a tokenizer.json splits text.

    Raises CheckpointError when it has none.
    """
    stored = tokenizer.get("pre_tokenizer") or {}
    steps = stored.get("pretokenizers", []) if stored.get("type") == "Sequence" else [stored]
    for name, known in PRE_TOKENIZERS.items():
        if [_essence(step) for step in steps] == [_essence(step) for step in known]:
            return name
    kinds = " + ".join(str(step.get("type")) for step in steps)
    raise CheckpointError(
        f"tokenizer.json: llama.cpp has no name for pre_tokenizer {kinds}",
        f"known: {', '.join(PRE_TOKENIZERS)}",
    )


def _essence(step: Json) -> Json:
    """The settings that decide how a step splits text. GPT-2's regex is the default."""
    step = {key: value for key, value in step.items() if key != "trim_offsets"}
    return {"use_regex": True, **step} if step.get("type") == "ByteLevel" else step


def _added(number: int, token: str, *, special: bool) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": special}


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(f"{KEYS}.{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"GGUF: tokenizer.ggml.{name} is missing")
    return values
