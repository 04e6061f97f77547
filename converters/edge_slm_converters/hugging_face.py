"""Writes a model as a Hugging Face checkpoint: the inverse of `checkpoint`, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_converters.architectures import architecture_of
from edge_slm_converters.architectures.base import as_stored
from edge_slm_converters.arrays import Float32
from edge_slm_converters.checkpoint import HEAD
from edge_slm_runtime.decoder import MATRICES, Decoder
from edge_slm_runtime.errors import DependencyMissing


def write_weights(
    folder: Path, decoder: Decoder, tensors: Mapping[str, Float32], dtype: Any = np.float32
) -> None:
    """Writes `config.json` and `model.safetensors` of canonical tensors.

    dtype: of the stored values. Raises DependencyMissing, and CheckpointError for a
    model that the format cannot describe.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise DependencyMissing(
            "writing a checkpoint needs safetensors", "pip install 'edge-slm[convert]'"
        ) from None
    architecture = architecture_of({"model_type": decoder.architecture})
    biased = {
        matrix
        for matrix in MATRICES
        for i in range(decoder.layers)
        if tensors[f"layers.{i}.{matrix}.bias"].any()
    }
    config = architecture.config(decoder, biased)
    stored = as_stored(architecture.layout(decoder, config), tensors)
    named = {
        (name if name == HEAD else f"{architecture.PREFIX}{name}"): np.ascontiguousarray(
            tensor, dtype
        )
        for name, tensor in stored.items()
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
