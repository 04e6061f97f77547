"""GPT-2 (Radford et al. 2019), as `GPT2LMHeadModel` of transformers stores it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from edge_slm_converters.architectures.base import (
    Config,
    Layout,
    activation,
    activation_name,
    check_llama_cpp,
    flag,
    positive,
    stored,
)
from edge_slm_converters.gguf_metadata import Metadata, Parts, Settings
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.decoder import gpt2 as gpt2_decoder
from edge_slm_runtime.errors import CheckpointError
from edge_slm_runtime.panels import stored_name

PREFIX = "transformer."
# The causal mask, in old checkpoints.
BUFFERS: tuple[str, ...] = (".attn.bias", ".attn.masked_bias")


def decoder(config: Config) -> Decoder:
    # reorder_and_upcast_attn only guards half precision against overflow: all our attention
    # runs in float32, so it needs nothing.
    layers, heads = positive(config, "n_layer"), positive(config, "n_head")
    width = positive(config, "n_embd")
    if width % heads:
        raise CheckpointError(f"config.json: n_embd {width} is not a multiple of n_head {heads}")
    scale = (width // heads) ** -0.5 if flag(config, "scale_attn_weights", True) else 1.0
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx", False)
    return gpt2_decoder(
        layers=layers,
        heads=heads,
        width=width,
        inner=positive(config, "n_inner", default=4 * width),
        vocab_size=positive(config, "vocab_size"),
        positions=positive(config, "n_positions"),
        activation=activation(config, "activation_function", "gelu_new"),
        norm_epsilon=positive(config, "layer_norm_epsilon", kind=float, default=1e-5),
        tied=flag(config, "tie_word_embeddings", True),
        attention_scale=tuple(scale / (i + 1 if by_layer else 1) for i in range(layers)),
    )


def layout(decoder: Decoder, config: Config) -> Layout:
    """Conv1D keeps weights as [inputs, outputs], queries, keys and values side by side: the
    canonical tensors under other names."""
    return {name: stored(shape, _name(name)) for name, shape in decoder.shapes().items()}


def config(decoder: Decoder, biased: Collection[str] = ()) -> dict[str, Any]:
    scales = {
        "scale_attn_weights": decoder.attention_scale[0] != 1.0,
        "scale_attn_by_inverse_layer_idx": len(set(decoder.attention_scale)) > 1,
    }
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": decoder.layers,
        "n_head": decoder.heads,
        "n_embd": decoder.width,
        "vocab_size": decoder.vocab_size,
        "n_positions": decoder.positions,
        "n_inner": decoder.inner,
        "activation_function": activation_name(decoder),
        "layer_norm_epsilon": decoder.norm_epsilon,
        "tie_word_embeddings": decoder.tied,
        **scales,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


GGUF_PARTS: Parts = {
    "qkv": ("attn_qkv",),
    "out": ("attn_output",),
    "up": ("ffn_up",),
    "down": ("ffn_down",),
}
GGUF_INTERLEAVED: tuple[str, ...] = ()
GGUF_NEEDS_BIASES = True


def gguf_decoder(metadata: Metadata) -> Decoder:
    width = metadata.integer("embedding_length")
    return gpt2_decoder(
        layers=metadata.integer("block_count"),
        heads=metadata.integer("attention.head_count"),
        width=width,
        vocab_size=0,
        positions=metadata.integer("context_length"),
        inner=metadata.integer("feed_forward_length", 4 * width),
        norm_epsilon=metadata.number("attention.layer_norm_epsilon", 1e-5),
    )


def gguf_settings(decoder: Decoder) -> Settings:
    check_llama_cpp(decoder, "gelu_tanh")
    return {
        "context_length": decoder.positions,
        "embedding_length": decoder.width,
        "block_count": decoder.layers,
        "feed_forward_length": decoder.inner,
        "attention.head_count": decoder.heads,
        "attention.layer_norm_epsilon": decoder.norm_epsilon,
        "vocab_size": decoder.vocab_size,
    }


def _name(canonical: str) -> str:
    """Bundles name tensors as GPT-2 does."""
    name = stored_name(canonical)
    return name if name.endswith((".weight", ".bias")) else f"{name}.weight"
