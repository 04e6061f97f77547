"""Architectures: what a config.json says, what is refused by name, and the way back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_slm_converters import random_checkpoint, read_checkpoint
from edge_slm_converters.architectures import ARCHITECTURES, architecture_of
from edge_slm_converters.hugging_face import write_weights
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError

from .conftest import Original
from .shapes import GPT2, LLAMA

USUAL: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 417,
    "max_position_embeddings": 96,
}


def decoder_of(**settings: Any) -> Decoder:
    config = USUAL | settings
    return architecture_of(config).decoder(config)


def test_a_llamas_traits() -> None:
    decoder = decoder_of()
    decoder.check()
    assert decoder.traits == ("rms", "rotary", "gated")
    assert (decoder.kv_heads, decoder.head_width, decoder.rope_theta) == (4, 16, 10000.0)
    assert not decoder.tied
    assert decoder_of(num_key_value_heads=2).cache_shape(3) == (4, 3, 2, 96, 16)
    assert decoder_of(head_dim=32).attention_width == 128


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window = 32"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window = 4096"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 1 << 21}, "a positive number up to 1048576, got 2097152"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ],
)
def test_what_cannot_be_converted_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        decoder_of(**settings)


def test_windows_as_long_as_the_context_are_none() -> None:
    decoder_of(model_type="mistral", sliding_window=96)
    decoder_of(model_type="mistral", sliding_window=None, max_position_embeddings=8192)
    decoder_of(model_type="qwen2", use_sliding_window=False, sliding_window=32)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_frequencies_are_those_of_transformers(key: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = LLAMA["llama3 scaling"]["rope_scaling"]
    for settings in (scaling, {"rope_type": "linear", "factor": 3.0}, {"rope_type": "default"}):
        theta = {"rope_theta": 500.0}
        config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_scaling=settings, **theta)
        expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
        given = {key: settings, **theta} if key == "rope_scaling" else {key: settings | theta}
        found = decoder_of(num_attention_heads=2, **given).rotary_frequencies()
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", ["plain", "untied", "scaled by layer", *LLAMA])
def test_written_weights_are_read_again(
    original: Callable[..., Original], tmp_path: Path, shape: str
) -> None:
    source = read_checkpoint(original(**{**GPT2, **LLAMA}[shape]).path)
    for name in ("tokenizer.json", "command.json"):
        shutil.copyfile(source.path / name, tmp_path / name)
    if len(set(source.decoder.rope_factors)) > 1:
        with pytest.raises(CheckpointError, match="factors"):
            write_weights(tmp_path, source.decoder, source.tensors)
        return
    write_weights(tmp_path, source.decoder, source.tensors)
    again = read_checkpoint(tmp_path)
    assert again.decoder == source.decoder
    assert list(again.tensors) == list(source.decoder.shapes())
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)


def test_random_llamas(tiny_text_side: Path, tmp_path: Path) -> None:
    shape = {"layers": 2, "width": 48, "heads": 3, "vocab_size": 417, "positions": 32}
    path = random_checkpoint(
        tmp_path / "m",
        **shape,
        like=tiny_text_side,
        architecture="llama",
        kv_heads=1,
        head_width=32,
        inner=100,
        tied=False,
    )
    source = read_checkpoint(path)
    decoder = source.decoder
    assert (decoder.kv_heads, decoder.head_width, decoder.inner) == (1, 32, 100)
    assert source.parameters == sum(
        t.size for name, t in source.tensors.items() if not name.endswith(".bias")
    )
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
    for traits in ({"architecture": "bert"}, {"architecture": "llama", "kv_heads": 2}):
        with pytest.raises(CheckpointError):
            random_checkpoint(tmp_path / "n", **shape, like=tiny_text_side, **traits)


def test_every_architecture_fills_every_tensor() -> None:
    for name, architecture in ARCHITECTURES.items():
        config = architecture.config(replace(decoder_of(), architecture=name))
        decoder = architecture.decoder(config | {"model_type": name})
        layout = architecture.layout(decoder, config)
        assert list(layout) == list(decoder.shapes())
