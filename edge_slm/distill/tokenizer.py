"""The byte-level BPE tokenizer of a model: control tokens, then bytes, then merges."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_slm_converters.text_side import OWN_SETTINGS, SETTINGS
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import CheckpointError
from edge_slm_runtime.files import write_json


def train_tokenizer(texts: Iterable[str], schema: CommandSchema, vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer`. Control tokens are ids 0 … n-1 in the schema's order.

    A leading space is a part of its word (the pre-tokenizer of GPT-2); decoding inverts
    encoding for any text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=schema.special_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes tokenizer.json, and the config that the AutoTokenizer of transformers reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(OWN_SETTINGS, folder / SETTINGS)


def with_control_tokens(
    tokenizer: dict[str, Any], schema: CommandSchema
) -> tuple[dict[str, Any], list[int | None]]:
    """(tokenizer.json with the control tokens as ids 0 … n-1, the old id of each new id).

    tokenizer: of a byte-level BPE. Its own added tokens are dropped: text does not contain
    them. Raises CheckpointError for another kind of tokenizer.
    """
    _refuse_other_kinds(tokenizer)
    added = {row["content"]: row["id"] for row in tokenizer["added_tokens"]}
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    control = schema.special_tokens()
    words = sorted((i, token) for token, i in vocabulary.items() if token not in added)
    names = [*control, *(token for _, token in words)]
    known = {**vocabulary, **added}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    changed = {
        **tokenizer,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True} for i, token in enumerate(control)
        ],
        "post_processor": None,
        "model": {**tokenizer["model"], "vocab": {token: i for i, token in enumerate(names)}},
    }
    return changed, [known.get(token) for token in names]


def _refuse_other_kinds(tokenizer: dict[str, Any]) -> None:
    """A byte-level BPE splits text in any steps, the last of which maps bytes to characters."""
    kind, splits = tokenizer["model"].get("type"), tokenizer.get("pre_tokenizer") or {}
    steps = splits.get("pretokenizers") or [splits]
    names = " + ".join(str(step.get("type")) for step in steps)
    if kind != "BPE" or steps[-1].get("type") != "ByteLevel":
        raise CheckpointError(f"its tokenizer is {kind} with {names}", "give a byte-level BPE")
    if tokenizer.get("normalizer") is not None:
        raise CheckpointError("its tokenizer has a normalizer, which would change requests")


def trimmed(tokenizer: dict[str, Any], texts: Iterable[str], size: int) -> dict[str, Any]:
    """tokenizer.json with at most `size` of its tokens: the bytes, and those that occur most
    often in `texts`, with all that they are merged from. Ids are counted anew.

    tokenizer: of a byte-level BPE, which can still write any text.
    """
    from tokenizers import Tokenizer

    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in _merges(tokenizer)]
    made_of: dict[str, tuple[str, str]] = {}
    for left, right in merges:
        made_of.setdefault(left + right, (left, right))
    kept = {token for token in tokenizer["model"]["vocab"] if len(token) == 1}
    for token, _ in _counts(Tokenizer.from_str(json.dumps(tokenizer)), texts).most_common():
        needed = _needed(token, made_of) - kept
        if len(kept) + len(needed) <= size:
            kept |= needed
    words = sorted((i, t) for t, i in tokenizer["model"]["vocab"].items() if t in kept)
    model = {
        **tokenizer["model"],
        "vocab": {token: i for i, (_, token) in enumerate(words)},
        "merges": [[a, b] for a, b in merges if {a, b, a + b} <= kept],
    }
    return {**tokenizer, "added_tokens": [], "post_processor": None, "model": model}


def _merges(tokenizer: dict[str, Any]) -> list[Any]:
    return list(tokenizer["model"]["merges"])


def _counts(tokenizer: Any, texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.tokens)
    return counts


def _needed(token: str, made_of: Mapping[str, tuple[str, str]]) -> set[str]:
    """The token and all that it is merged from."""
    needed, todo = set(), [token]
    while todo:
        one = todo.pop()
        needed.add(one)
        todo += made_of.get(one, ())
    return needed
