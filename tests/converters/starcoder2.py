"""A third architecture, to show what one takes: StarCoder2 (Lozhkov et al., arXiv 2402.19173), as
`Starcoder2ForCausalLM` of transformers stores it. Layer norms and a plain MLP as in GPT-2, rotary
positions and grouped heads as in Llama: traits that neither has together.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from edge_slm_converters.architectures import llama
from edge_slm_converters.architectures.base import (
    Config,
    Layout,
    activation,
    activation_name,
    bias,
    check_llama_cpp,
    linear,
    positive,
    stored,
)
from edge_slm_converters.gguf_metadata import Metadata, Parts, Settings
from edge_slm_runtime.decoder import Decoder, gpt2

PREFIX = "model."
BUFFERS: tuple[str, ...] = ()
_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "up": ("mlp.c_fc",),
    "down": ("mlp.c_proj",),
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def decoder(config: Config) -> Decoder:
    layers, heads = positive(config, "num_hidden_layers"), positive(config, "num_attention_heads")
    width, positions = positive(config, "hidden_size"), positive(config, "max_position_embeddings")
    llama.refuse_windows(config, positions)
    head_width = width // heads
    theta, factors = llama.rotary(config, head_width)
    return Decoder(
        architecture="starcoder2",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=positive(config, "num_key_value_heads", default=heads),
        head_width=head_width,
        inner=positive(config, "intermediate_size"),
        vocab_size=positive(config, "vocab_size"),
        positions=positions,
        norm="layer",
        norm_epsilon=positive(config, "norm_epsilon", kind=float, default=1e-5),
        position="rotary",
        rope_theta=theta,
        rope_factors=factors,
        mlp="plain",
        activation=activation(config, "hidden_act", "gelu_pytorch_tanh"),
        attention_scale=(head_width**-0.5,) * layers,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def layout(decoder: Decoder, config: Config) -> Layout:
    d, biased = decoder, bool(config.get("use_bias", True))
    widths = {"self_attn.k_proj": d.kv_width, "self_attn.v_proj": d.kv_width}
    found = {
        "embedding": stored((d.vocab_size, d.width), "embed_tokens.weight"),
        "head.weight": stored((d.vocab_size, d.width), "lm_head.weight"),
        "final_norm.weight": stored((d.width,), "norm.weight"),
        "final_norm.bias": stored((d.width,), "norm.bias"),
    }
    for i in range(d.layers):
        here = f"layers.{i}."
        for norm, name in _NORMS.items():
            for kind in ("weight", "bias"):
                found[f"{here}{norm}.{kind}"] = stored((d.width,), f"{here}{name}.{kind}")
        for matrix, (inputs, outputs) in d.layer_matrices().items():
            whole = d.attention_width if matrix == "qkv" else outputs
            sizes = {name: widths.get(name, whole) for name in _PARTS[matrix]}
            found[f"{here}{matrix}.weight"] = linear(
                inputs, {f"{here}{name}.weight": size for name, size in sizes.items()}
            )
            found[f"{here}{matrix}.bias"] = bias(
                {f"{here}{name}.bias": size for name, size in sizes.items()}, biased
            )
    return {name: found[name] for name in d.shapes()}


def config(decoder: Decoder, biased: Collection[str] = ()) -> dict[str, Any]:
    return {
        "model_type": "starcoder2",
        "architectures": ["Starcoder2ForCausalLM"],
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.inner,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.positions,
        "hidden_act": activation_name(decoder),
        "norm_epsilon": decoder.norm_epsilon,
        "rope_theta": decoder.rope_theta,
        "sliding_window": None,
        "use_bias": bool(biased),
        "tie_word_embeddings": decoder.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


GGUF_PARTS: Parts = {**llama.GGUF_PARTS, "up": ("ffn_up",)}
GGUF_INTERLEAVED: tuple[str, ...] = ()
GGUF_NEEDS_BIASES = True


def gguf_decoder(metadata: Metadata) -> Decoder:
    width, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    layers = metadata.integer("block_count")
    return gpt2(
        architecture="starcoder2",
        layers=layers,
        heads=heads,
        kv_heads=metadata.integer("attention.head_count_kv", heads),
        width=width,
        inner=metadata.integer("feed_forward_length"),
        vocab_size=0,
        positions=metadata.integer("context_length"),
        norm_epsilon=metadata.number("attention.layer_norm_epsilon"),
        position="rotary",
        rope_theta=metadata.number("rope.freq_base", 10000.0),
    )


def gguf_settings(decoder: Decoder) -> Settings:
    check_llama_cpp(decoder, "gelu_tanh")
    return {
        "context_length": decoder.positions,
        "embedding_length": decoder.width,
        "block_count": decoder.layers,
        "feed_forward_length": decoder.inner,
        "attention.head_count": decoder.heads,
        "attention.head_count_kv": decoder.kv_heads,
        "attention.layer_norm_epsilon": decoder.norm_epsilon,
        "rope.dimension_count": decoder.head_width,
        "rope.freq_base": decoder.rope_theta,
        "vocab_size": decoder.vocab_size,
    }
