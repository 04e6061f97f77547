"""Architectures by the `model_type` of config.json: one module each (see `base.Architecture`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_slm_converters.architectures import gpt2, llama
from edge_slm_converters.architectures.base import Architecture, Config, refuse_unless
from edge_slm_runtime.errors import CheckpointError

ARCHITECTURES: Mapping[str, Architecture] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
}

# By `general.architecture` of a GGUF file.
GGUF_ARCHITECTURES: Mapping[str, Architecture] = {"gpt2": gpt2, "llama": llama}

# Settings of every architecture that would change the computation, and their harmless values.
_ALLOWED: Mapping[str, Sequence[Any]] = {
    "add_cross_attention": [False],
    "pruned_heads": [{}],
    "quantization_config": [],
}


def architecture_of(config: Config) -> Architecture:
    """Raises CheckpointError for one that cannot be converted."""
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        raise CheckpointError(
            f"config.json: model_type {config.get('model_type')!r} cannot be converted",
            f"these can: {', '.join(ARCHITECTURES)}",
        )
    refuse_unless(config, _ALLOWED)
    return architecture
