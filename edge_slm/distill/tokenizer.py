"""The byte-level BPE tokenizer of a new model: control tokens, then bytes, then merges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edge_slm_runtime.command import END, CommandSchema


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
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
