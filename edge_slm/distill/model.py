"""The model that is trained: fresh, or grown from a checkpoint of a known architecture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm.distill.recipe import ModelRecipe
from edge_slm.distill.tokenizer import trimmed, with_control_tokens
from edge_slm_converters.architectures import architecture_of
from edge_slm_converters.architectures.base import as_stored
from edge_slm_converters.checkpoint import HEAD
from edge_slm_converters.sums import check_sums
from edge_slm_runtime.bundle import file_entry
from edge_slm_runtime.command import END, REQUEST, CommandSchema
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError


def fresh_model(recipe: ModelRecipe, seed: int) -> Any:
    """A causal language model of transformers with random weights of the recipe's shape."""
    import torch

    torch.manual_seed(seed)
    return _of_decoder(recipe.decoder(), recipe)


_BY_NUMBER = "scale_attn_by_inverse_layer_idx"  # what a layer does depends on its number


def grown_model(
    recipe: ModelRecipe, schema: CommandSchema, seed: int, texts: Iterable[str] = ()
) -> tuple[Any, Any]:
    """(model, tokenizer) of `recipe.init`, with the control tokens of the schema in front of
    its vocabulary.

    init: a folder in the Hugging Face layout, its name on the hub, or a GGUF file. Tokens keep
    their embeddings; those of new tokens are drawn from the mean and standard deviation of
    all (as in Quark, Lu et al., arXiv 2205.13636), those of neighbouring values alike. With
    `recipe.trim`, only so many tokens are kept, those that `texts` use; with
    `recipe.keep_layers`, only those layers. Positions beyond the recipe's are cut off. Raises
    CheckpointError.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import GenerationConfig

    from_file = recipe.init.endswith(".gguf")
    model, old_tokenizer = (gguf_model if from_file else _from_transformers)(recipe)
    config = model.config
    if config.max_position_embeddings < recipe.positions:
        raise CheckpointError(
            f"{recipe.init} has {config.max_position_embeddings} positions, the recipe "
            f"{recipe.positions}",
            "lower model.positions",
        )
    vocabulary = {token["content"]: token["id"] for token in old_tokenizer["added_tokens"]}
    vocabulary |= old_tokenizer["model"]["vocab"]
    if recipe.trim:
        old_tokenizer = trimmed(old_tokenizer, texts, recipe.trim)
    tokenizer, _ = with_control_tokens(old_tokenizer, schema)
    names = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    # What begins and ends its texts begins and ends ours.
    vocabulary = {REQUEST: config.bos_token_id, END: config.eos_token_id} | vocabulary
    old_ids = [vocabulary.get(token) for token, _ in names]
    generator = torch.Generator().manual_seed(seed)
    tables = [model.get_input_embeddings]
    if not config.tie_word_embeddings:
        tables.append(model.get_output_embeddings)
    likeness = _likeness(schema)
    rows = [_renumbered(table().weight.data, old_ids, likeness, generator) for table in tables]
    model.resize_token_embeddings(len(old_ids), mean_resizing=False)
    for table, values in zip(tables, rows, strict=True):
        table().weight.data.copy_(values)
    model.get_input_embeddings().padding_idx = None  # a padding row would not be trained
    _cut_positions(model, recipe.positions)
    if recipe.keep_layers:
        _keep_layers(model, recipe)
    config.update({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None})
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    return model, Tokenizer.from_str(json.dumps(tokenizer))


def weights_digest(init: str) -> str | None:
    """sha256 of the local weights `init`; None for a hub name or weights in several files."""
    path = Path(init)
    file = path if path.is_file() else path / "model.safetensors"
    return file_entry(file).sha256 if file.is_file() else None


def _of_decoder(decoder: Decoder, recipe: ModelRecipe) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = architecture_of({"model_type": decoder.architecture}).config(decoder)
    config = AutoConfig.for_model(**settings)
    _set_dropout(config, recipe)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def _from_transformers(recipe: ModelRecipe) -> tuple[Any, dict[str, Any]]:
    """(model, its tokenizer.json)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = recipe.init
    check_sums(Path(where))
    try:
        config = AutoConfig.from_pretrained(where)
        settings = config.to_dict()
        architecture_of(settings).decoder(settings)  # what cannot be converted is not trained
        _set_dropout(config, recipe)
        model = AutoModelForCausalLM.from_pretrained(
            where, config=config, attn_implementation="sdpa", dtype=torch.float32
        )
        tokenizer = json.loads(AutoTokenizer.from_pretrained(where).backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"cannot start from {where}: {str(error).splitlines()[0]}",
            "give the folder of a checkpoint with its tokenizer, a GGUF file, or a hub name",
        ) from None
    return model, tokenizer


def gguf_model(recipe: ModelRecipe) -> tuple[Any, dict[str, Any]]:
    """(model, its tokenizer.json) of the GGUF file `recipe.init`. Raises CheckpointError."""
    import torch

    from edge_slm_converters.gguf_reader import read_gguf
    from edge_slm_converters.gguf_tokenizer import tokenizer_json

    source = read_gguf(Path(recipe.init))
    decoder = source.decoder
    architecture = architecture_of({"model_type": decoder.architecture})
    config = architecture.config(decoder)
    layout = architecture.layout(decoder, config)
    lost = [name for name in layout if not layout[name].names and source.tensors[name].any()]
    if lost or architecture.decoder(config) != decoder:
        raise CheckpointError(
            f"{recipe.init}: a {decoder.architecture} with {lost[0] if lost else 'rope scaling'} "
            "cannot be trained",
            "give its Hugging Face folder",
        )
    model = _of_decoder(decoder, recipe)
    state = {
        name if name == HEAD else architecture.PREFIX + name: torch.from_numpy(np.array(tensor))
        for name, tensor in as_stored(layout, source.tensors).items()
    }
    for name in ("bos_token_id", "eos_token_id"):
        setattr(model.config, name, source.metadata.values.get(f"tokenizer.ggml.{name}"))
    # What may be missing: a tied head, and buffers.
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model, tokenizer_json(source.metadata.values)


def _likeness(schema: CommandSchema) -> Any:
    """[control tokens, control tokens]: weights that make the draws of neighbouring values of
    an ordered axis alike, each of norm 1. What is learnt of one length then holds for the
    next, which a few thousand records need."""
    import torch

    control = schema.special_tokens()
    at = torch.arange(len(control), dtype=torch.float32)
    weights = torch.eye(len(control))
    for axis in schema.axes:
        if axis.kind == "category":
            continue
        tokens = [control.index(axis.token(value)) for value in axis.values]
        rows = slice(tokens[0], tokens[-1] + 1)
        width = 1.5 if axis.kind == "bucket" else 0.5
        distance = at[rows, None] - at[None, rows]
        weights[rows, rows] = torch.exp(-(distance**2) / (2 * width**2))
    return weights / weights.norm(dim=1, keepdim=True)


def _renumbered(old: Any, old_ids: Sequence[int | None], likeness: Any, generator: Any) -> Any:
    """[new tokens, width]: the rows of the old ids; new rows as those are distributed."""
    import torch

    drawn = torch.randn(len(old_ids), old.shape[1], generator=generator)
    drawn[: len(likeness)] = likeness @ drawn[: len(likeness)]
    rows = old.mean(0) + old.std(0) * drawn
    known = torch.tensor([i is not None for i in old_ids])
    rows[known] = old[torch.tensor([i for i in old_ids if i is not None])]
    return rows


def _cut_positions(model: Any, positions: int) -> None:
    import torch

    if (learned := getattr(model.base_model, "wpe", None)) is not None:
        kept = torch.nn.Embedding(positions, learned.weight.shape[1])
        kept.weight.data.copy_(learned.weight.data[:positions])
        model.base_model.wpe = kept
    # Masks and tables of the size of the context are rebuilt from the config on loading.
    model.config.update({"max_position_embeddings": positions})


def _keep_layers(model: Any, recipe: ModelRecipe) -> None:
    """Raises CheckpointError."""
    config, kept = model.config, recipe.keep_layers
    if kept[-1] >= config.num_hidden_layers or getattr(config, _BY_NUMBER, False):
        why = f"{config.num_hidden_layers} layers"
        why += f", and {_BY_NUMBER}" if getattr(config, _BY_NUMBER, False) else ""
        raise CheckpointError(
            f"{recipe.init} has {why}: it cannot keep {list(kept)}", "change model.keep_layers"
        )
    name = "h" if hasattr(model.base_model, "h") else "layers"
    layers = getattr(model.base_model, name)
    chosen = [layers[number] for number in kept]
    for number, layer in enumerate(chosen):  # which finds its keys and values by its number
        attention = next(part for part in layer.children() if hasattr(part, "layer_idx"))
        attention.layer_idx = number
    setattr(model.base_model, name, type(layers)(chosen))
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[number] for number in kept]
    config.num_hidden_layers = len(chosen)


def _set_dropout(config: Any, recipe: ModelRecipe) -> None:
    """Of embeddings and residuals, where the architecture has it (a Llama does not)."""
    rates = {"resid_pdrop": recipe.dropout, "embd_pdrop": recipe.dropout, "attn_pdrop": 0.0}
    config.update({name: rate for name, rate in rates.items() if hasattr(config, name)})
