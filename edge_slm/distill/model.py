"""The model that is trained: GPT-2, fresh or grown from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_slm.distill.recipe import ModelRecipe
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import CheckpointError


def fresh_model(recipe: ModelRecipe, seed: int) -> Any:
    """A `GPT2LMHeadModel` with random weights of the recipe's shape."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=recipe.vocab_size,
            n_positions=recipe.positions,
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
            **_dropout(recipe),
        )
    )


def grown_model(recipe: ModelRecipe, schema: CommandSchema, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer) of the checkpoint `recipe.init`, a folder or a hub name, with the
    schema's control tokens in front of its vocabulary.

    Embeddings of tokens that it has stay; those of new ones are drawn from the mean
    and standard deviation of its embeddings (as in Quark, Lu et al., arXiv
    2205.13636). Positions beyond the recipe's are cut off. Raises CheckpointError.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, GPT2LMHeadModel

    where = recipe.init
    try:
        model = GPT2LMHeadModel.from_pretrained(
            where, attn_implementation="sdpa", dtype=torch.float32, **_dropout(recipe)
        )
        backend = AutoTokenizer.from_pretrained(where).backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"cannot start from {where}: {str(error).splitlines()[0]}",
            "give the folder of a GPT-2 checkpoint with its tokenizer, or its name on the hub",
        ) from None
    if model.config.n_positions < recipe.positions:
        raise CheckpointError(
            f"{where} has {model.config.n_positions} positions, the recipe {recipe.positions}",
            "lower model.positions",
        )
    tokenizer, old_ids = with_control_tokens(json.loads(backend.to_str()), schema)
    old = model.transformer.wte.weight.data
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(old_ids), old.shape[1], generator=generator)
    rows = old.mean(0) + old.std(0) * drawn
    kept = torch.tensor([i is not None for i in old_ids])
    rows[kept] = old[torch.tensor([i for i in old_ids if i is not None])]
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    model.transformer.wte.weight.data.copy_(rows)
    positions = torch.nn.Embedding(recipe.positions, old.shape[1])
    positions.weight.data.copy_(model.transformer.wpe.weight.data[: recipe.positions])
    model.transformer.wpe = positions
    # Masks of the size of the context are rebuilt from the config on loading.
    model.config.update({"n_positions": recipe.positions, "bos_token_id": 0, "eos_token_id": 0})
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = 0
    return model, Tokenizer.from_str(json.dumps(tokenizer))


def with_control_tokens(
    tokenizer: dict[str, Any], schema: CommandSchema
) -> tuple[dict[str, Any], list[int | None]]:
    """(a byte-level BPE's JSON with the control tokens as ids 0 … n-1, per new id the old one).

    Other special tokens than the schema's are dropped: text never holds them.
    Raises CheckpointError for another kind of tokenizer.
    """
    kind, before = tokenizer["model"].get("type"), tokenizer.get("pre_tokenizer") or {}
    if kind != "BPE" or before.get("type") != "ByteLevel":
        raise CheckpointError(
            f"its tokenizer is {kind} with {before.get('type')}", "GPT-2's byte-level BPE is needed"
        )
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


def weights_digest(folder: str) -> str | None:
    """sha256 of a local checkpoint's weights; None for a hub name or other weights."""
    import hashlib

    file = Path(folder) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _dropout(recipe: ModelRecipe) -> dict[str, float]:
    return {"resid_pdrop": recipe.dropout, "embd_pdrop": recipe.dropout, "attn_pdrop": 0.0}
