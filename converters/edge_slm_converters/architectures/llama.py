"""The Llama family (Touvron et al., arXiv 2302.13971), as transformers stores it:
`LlamaForCausalLM`, and those that differ from it in biases alone."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from edge_slm_converters.architectures.base import (
    Config,
    Layout,
    Stored,
    activation,
    activation_name,
    bias,
    check_llama_cpp,
    flag,
    linear,
    positive,
    refuse_unless,
    stored,
)
from edge_slm_converters.gguf_metadata import Metadata, Parts, Settings
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError

PREFIX = "model."
BUFFERS: tuple[str, ...] = (".rotary_emb.inv_freq",)  # frequencies, in old checkpoints


def decoder(config: Config) -> Decoder:
    refuse_unless(config, {"partial_rotary_factor": [1.0]})
    layers, heads = positive(config, "num_hidden_layers"), positive(config, "num_attention_heads")
    width = positive(config, "hidden_size")
    kv_heads = positive(config, "num_key_value_heads", default=heads)
    if config.get("head_dim") is None and width % heads:
        raise CheckpointError(
            f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads}"
        )
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    head_width = positive(config, "head_dim", default=width // heads)
    if head_width % 2:
        raise CheckpointError(f"config.json: head_dim {head_width} is odd")
    positions = positive(config, "max_position_embeddings", default=2048)
    refuse_windows(config, positions)
    theta, factors = rotary(config, head_width)
    return Decoder(
        architecture="llama",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        inner=positive(config, "intermediate_size"),
        vocab_size=positive(config, "vocab_size"),
        positions=positions,
        norm="rms",
        norm_epsilon=positive(config, "rms_norm_eps", kind=float, default=1e-6),
        position="rotary",
        rope_theta=theta,
        rope_factors=factors,
        mlp="gated",
        activation=activation(config, "hidden_act", "silu"),
        attention_scale=(head_width**-0.5,) * layers,
        tied=flag(config, "tie_word_embeddings", False),
    )


def layout(decoder: Decoder, config: Config) -> Layout:
    """Weights are stored as [outputs, inputs]: q, k, v apart, gate and up apart."""
    d, biased = decoder, _biased(config)
    places: dict[str, Stored] = {
        "embedding": stored((d.vocab_size, d.width), "embed_tokens.weight"),
        "final_norm.weight": stored((d.width,), "norm.weight"),
        "head.weight": stored((d.vocab_size, d.width), "lm_head.weight"),
    }
    for i in range(d.layers):
        parts = {
            "qkv": {"self_attn.q_proj": d.attention_width}
            | dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), d.kv_width),
            "out": {"self_attn.o_proj": d.width},
            "up": dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), d.inner),
            "down": {"mlp.down_proj": d.width},
        }
        here = f"layers.{i}."
        for norm, name in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            places[f"{here}{norm}.weight"] = stored((d.width,), f"{here}{name}.weight")
        for matrix, (inputs, _) in d.layer_matrices().items():
            outputs = {here + name: size for name, size in parts[matrix].items()}
            places[f"{here}{matrix}.weight"] = linear(
                inputs, {f"{name}.weight": size for name, size in outputs.items()}
            )
            places[f"{here}{matrix}.bias"] = bias(
                {f"{name}.bias": size for name, size in outputs.items()}, matrix in biased
            )
    return {name: places[name] for name in d.shapes()}


def config(decoder: Decoder, biased: Collection[str] = ()) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_width,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.inner,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.positions,
        "hidden_act": activation_name(decoder),
        "rms_norm_eps": decoder.norm_epsilon,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": _scaling(decoder),
        "attention_bias": not {"qkv", "out"}.isdisjoint(biased),
        "mlp_bias": not {"up", "down"}.isdisjoint(biased),
        "tie_word_embeddings": decoder.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


GGUF_PARTS: Parts = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
GGUF_INTERLEAVED: tuple[str, ...] = ("attn_q", "attn_k")
GGUF_NEEDS_BIASES = False
# Keys of a GGUF file that change the computation, and their harmless values.
_GGUF_ALLOWED = {"expert_count": 0, "attention.clamp_kqv": 0.0, "attention.scale": 0.0}


def gguf_decoder(metadata: Metadata) -> Decoder:
    for key, harmless in _GGUF_ALLOWED.items():
        if (value := metadata.of_model(key)) not in (None, harmless):
            raise CheckpointError(f"GGUF: llama.{key} = {value!r} cannot be converted")
    layers, heads = metadata.integer("block_count"), metadata.integer("attention.head_count")
    kv_heads = metadata.integer("attention.head_count_kv", heads)
    width, positions = metadata.integer("embedding_length"), metadata.integer("context_length")
    head_width = metadata.integer("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := metadata.integer(key, head_width)) != head_width:
            raise CheckpointError(f"GGUF: llama.{key} is {size}, heads are {head_width} wide")
    if heads % kv_heads or head_width % 2:
        raise CheckpointError(f"GGUF: {heads} heads of {head_width}, {kv_heads} of keys")
    if metadata.integer("attention.sliding_window", positions) < positions:
        raise CheckpointError("GGUF: attention in a sliding window cannot be converted")
    return Decoder(
        architecture="llama",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        inner=metadata.integer("feed_forward_length"),
        vocab_size=0,
        positions=positions,
        norm="rms",
        norm_epsilon=metadata.number("attention.layer_norm_rms_epsilon"),
        position="rotary",
        rope_theta=metadata.number("rope.freq_base", 10000.0),
        rope_factors=_gguf_factors(metadata, head_width),
        mlp="gated",
        activation="silu",
        attention_scale=(head_width**-0.5,) * layers,
        tied=False,
    )


def gguf_settings(decoder: Decoder) -> Settings:
    check_llama_cpp(decoder, "silu")
    factors = set(decoder.rope_factors)
    return {
        "context_length": decoder.positions,
        "embedding_length": decoder.width,
        "block_count": decoder.layers,
        "feed_forward_length": decoder.inner,
        "attention.head_count": decoder.heads,
        "attention.head_count_kv": decoder.kv_heads,
        "attention.key_length": decoder.head_width,
        "attention.value_length": decoder.head_width,
        "attention.layer_norm_rms_epsilon": decoder.norm_epsilon,
        "rope.dimension_count": decoder.head_width,
        "rope.freq_base": decoder.rope_theta,
        # Factors that differ from one another are a tensor (`gguf_tensors.ROPE_FACTORS`).
        **(
            {"rope.scaling.type": "linear", "rope.scaling.factor": factors.pop()}
            if len(factors) == 1
            else {}
        ),
        "vocab_size": decoder.vocab_size,
    }


def _gguf_factors(metadata: Metadata, head_width: int) -> tuple[float, ...]:
    kind = metadata.of_model("rope.scaling.type") or "none"
    if kind == "none":
        return ()
    if kind != "linear":
        raise CheckpointError(f"GGUF: rope.scaling.type {kind!r} cannot be converted", "linear can")
    return (metadata.number("rope.scaling.factor"),) * (head_width // 2)


def _biased(config: Config) -> set[str]:
    """The matrices that have biases. Mistral has none, Qwen2 those of q, k and v."""
    if config.get("model_type") == "qwen2":
        return {"qkv"}
    attention = {"qkv", "out"} if flag(config, "attention_bias", False) else set()
    return attention | ({"up", "down"} if flag(config, "mlp_bias", False) else set())


def refuse_windows(config: Config, positions: int) -> None:
    """Sliding windows, unless they are as long as the context."""
    refuse_unless(config, {"use_sliding_window": [False]})
    if config["model_type"] != "qwen2":  # which has the window switched off
        default = 4096 if config["model_type"] == "mistral" else None
        window = config.get("sliding_window", default)
        if window is not None and window < positions:
            raise CheckpointError(
                f"config.json: sliding_window = {window} cannot be converted",
                f"attention that sees all {positions} positions can",
            )
    if others := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise CheckpointError(f"config.json: layer_types {min(others)!r} cannot be converted")


def rotary(config: Config, head_width: int) -> tuple[float, tuple[float, ...]]:
    """rope_theta and rope_factors. Newer files keep both in `rope_parameters`."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(positive({**config, **scaling}, "rope_theta", kind=int | float, default=10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, ()
    if kind == "linear":
        return theta, (_number(scaling, "factor"),) * (head_width // 2)
    if kind == "llama3":
        return theta, _llama3_factors(scaling, theta, head_width)
    raise CheckpointError(
        f"config.json: rope scaling {kind!r} cannot be converted", "linear and llama3 can"
    )


def _scaling(decoder: Decoder) -> dict[str, Any] | None:
    """`rope_scaling` of a Decoder. Raises CheckpointError for factors that are not linear."""
    if len(factors := set(decoder.rope_factors)) > 1:
        raise CheckpointError("config.json cannot say rotary factors that are not linear")
    return {"rope_type": "linear", "factor": factors.pop()} if factors else None


def _llama3_factors(scaling: Config, theta: float, head_width: int) -> tuple[float, ...]:
    """Llama 3.1's: wavelengths longer than the context that was trained on first are
    stretched by `factor`, short ones are not, and those between by something between."""
    factor, low = _number(scaling, "factor"), _number(scaling, "low_freq_factor")
    high, trained = (
        _number(scaling, "high_freq_factor"),
        _number(scaling, "original_max_position_embeddings"),
    )
    if not high > low:
        raise CheckpointError("config.json: high_freq_factor must be above low_freq_factor")
    frequencies = theta ** (-np.arange(0, head_width, 2) / head_width)
    waves = trained * frequencies / (2 * math.pi)  # in the context of the first training
    share = np.clip((waves - low) / (high - low), 0, 1)
    return tuple((1 / (share + (1 - share) / factor)).tolist())


def _number(scaling: Config, key: str) -> float:
    return float(positive(scaling, key, kind=int | float))
