"""Writes a CTranslate2 model from numpy arrays.

CTranslate2's own converter needs transformers and torch; its specifications do
not, so we fill them ourselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.quantise import step_bytes
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import EngineNotInstalled

QUANTISATION = {"fp32": "float32", "int8": "int8_float32"}
ACTIVATION = {
    "gelu_tanh": "GELUTanh",
    "gelu": "GELU",
    "relu": "RELU",
    "silu": "SWISH",
    "tanh": "Tanh",
}
_ALL = slice(None)


def write_ctranslate2(checkpoint: Checkpoint, precision: str, folder: Path) -> int:
    """Writes `folder/model.bin`, `config.json` and `vocabulary.json`.

    precision: a key of `QUANTISATION`; int8 is one scale per output row, and the
    activations are quantised per position as it runs. Returns the bytes of
    weights that one decoding step reads. Raises EngineNotInstalled.
    """
    try:
        from ctranslate2.specs import common_spec, transformer_spec
    except ImportError:
        raise EngineNotInstalled(
            "writing this variant needs ctranslate2", "pip install 'edge-slm[ctranslate2]'"
        ) from None
    decoder = checkpoint.decoder
    activation = getattr(common_spec.Activation, ACTIVATION[decoder.activation])
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        decoder.layers,
        decoder.heads,
        pre_norm=True,
        activation=activation,
        ffn_glu=decoder.mlp == "gated",
        rms_norm=decoder.norm == "rms",
        **_rotary(decoder),
        **_heads(decoder),
    )
    _fill(spec.decoder, checkpoint)
    spec.register_vocabulary(_vocabulary(checkpoint))
    end = checkpoint.tokens[checkpoint.codec.ends[0]]
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    spec.config.add_attribute("layer_norm_epsilon", decoder.norm_epsilon)
    spec.validate()
    spec.optimize(quantization=QUANTISATION[precision])
    _check(spec, checkpoint, precision)
    spec.save(str(folder))
    return step_bytes(decoder, precision)


def _rotary(decoder: Decoder) -> dict[str, Any]:
    """Settings of rotary positions. Factors that differ from one another are those of LongRoPE
    ("Su"), for a context that is not stretched."""
    from ctranslate2.specs.attention_spec import RotaryScalingType

    if decoder.position != "rotary":
        return {}
    settings = {
        "rotary_dim": 0,  # of the whole head
        "rotary_interleave": False,
        "rotary_base": decoder.rope_theta,
    }
    if not decoder.rope_factors:
        return settings
    if len(set(decoder.rope_factors)) == 1:
        linear = {"rotary_scaling_factor": decoder.rope_factors[0]}
        return {**settings, "rotary_scaling_type": RotaryScalingType.Linear, **linear}
    stretch = ("original_max_position_embeddings", "max_position_embeddings")
    settings |= dict.fromkeys(stretch, decoder.positions)
    return {**settings, "rotary_scaling_type": RotaryScalingType.Su}


def _heads(decoder: Decoder) -> dict[str, int]:
    """Settings of heads, where they are not those of a GPT-2."""
    settings = {}
    if decoder.kv_heads != decoder.heads:
        settings["num_heads_kv"] = decoder.kv_heads
    if decoder.attention_width != decoder.width:
        settings["head_dim"] = decoder.head_width
    return settings


def _fill(spec: Any, checkpoint: Checkpoint) -> None:
    # The specification quantises in place: it gets copies, but one and the same
    # array for a tied embedding, which it then stores once.
    decoder, tensors = checkpoint.decoder, checkpoint.tensors
    spec.scale_embeddings = False
    spec.embeddings.weight = tensors["embedding"].copy()
    if decoder.position == "learned":
        spec.position_encodings.encodings = tensors["positions"].copy()
    spec.projection.weight = (
        spec.embeddings.weight if decoder.tied else tensors["head.weight"].copy()
    )
    _norm(spec.layer_norm, checkpoint, "final_norm")
    for i, layer in enumerate(spec.layer):
        attention, ffn = layer.self_attention, layer.ffn
        _norm(attention.layer_norm, checkpoint, f"layers.{i}.attention_norm")
        _linear(attention.linear[0], checkpoint, f"layers.{i}.qkv")
        _linear(attention.linear[1], checkpoint, f"layers.{i}.out")
        attention.queries_scale = np.float32(decoder.attention_scale[i])
        if len(set(decoder.rope_factors)) > 1:
            factors = np.array(decoder.rope_factors, np.float32)
            attention.rotary_scaling_long_factor = factors
            attention.rotary_scaling_short_factor = factors
        _norm(ffn.layer_norm, checkpoint, f"layers.{i}.mlp_norm")
        if decoder.mlp == "gated":
            _linear(ffn.linear_0, checkpoint, f"layers.{i}.up", slice(decoder.inner))
            _linear(ffn.linear_0_noact, checkpoint, f"layers.{i}.up", slice(decoder.inner, None))
        else:
            _linear(ffn.linear_0, checkpoint, f"layers.{i}.up")
        _linear(ffn.linear_1, checkpoint, f"layers.{i}.down")


def _norm(spec: Any, checkpoint: Checkpoint, name: str) -> None:
    spec.gamma = checkpoint.tensors[f"{name}.weight"].copy()
    if checkpoint.decoder.norm == "layer":
        spec.beta = checkpoint.tensors[f"{name}.bias"].copy()


def _linear(spec: Any, checkpoint: Checkpoint, name: str, outputs: slice = _ALL) -> None:
    spec.weight = checkpoint.tensors[f"{name}.weight"].T[outputs].copy()
    spec.bias = checkpoint.tensors[f"{name}.bias"][outputs].copy()


def _vocabulary(checkpoint: Checkpoint) -> list[str]:
    """The tokens, and for the padding of the vocabulary names that no token has."""
    padding = range(len(checkpoint.tokens), checkpoint.decoder.vocab_size)
    return [*checkpoint.tokens, *(f"<|padding:{i}|>" for i in padding)]


def _check(spec: Any, checkpoint: Checkpoint, precision: str) -> None:
    """Every matrix has the type asked for, and a tied embedding is one tensor."""
    decoder = checkpoint.decoder
    dtype = "int8" if precision == "int8" else "float32"
    matrices = [
        name
        for name, value in spec.variables().items()
        if name.endswith("/weight") and not isinstance(value, str) and value.dtype == dtype
    ]
    expected = (5 if decoder.mlp == "gated" else 4) * decoder.layers + (1 if decoder.tied else 2)
    if len(matrices) != expected:
        raise AssertionError(f"{len(matrices)} matrices are {dtype}, not {expected}")
