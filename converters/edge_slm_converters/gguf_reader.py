"""Reads a GGUF file: its metadata as a Decoder, its tensors in canonical form.

The `gguf` package decodes quantised blocks to float32, so a converted model is what the file
holds, not what it was quantised from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_slm_converters.arrays import Float32
from edge_slm_converters.gguf_tensors import GPT2_PARTS, LLAMA_PARTS, Parts, joined, stored_names
from edge_slm_runtime.decoder import Decoder, gpt2
from edge_slm_runtime.engines.base import first_line
from edge_slm_runtime.errors import CheckpointError, DependencyMissing

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Metadata:
    """Keys and values of a GGUF file. Raises CheckpointError, naming the key."""

    values: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above zero. key: without the name of the architecture."""
        return int(self._positive(key, int, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero."""
        return self._positive(key, int | float, default)

    def of_model(self, key: str) -> Any:
        """The value of a key of the architecture; None where it is missing."""
        return self.values.get(f"{self.architecture}.{key}")

    def _positive(self, key: str, kind: Any, default: float | None) -> float:
        value = self.of_model(key)
        value = default if value is None else value
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
            raise CheckpointError(
                f"GGUF: {self.architecture}.{key} must be a positive number, got {value!r}"
            )
        return float(value)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file, checked: every tensor of `decoder` is there, has its shape, and is finite."""

    decoder: Decoder
    tensors: Mapping[str, Float32]
    metadata: Metadata


def gpt2_decoder(metadata: Metadata) -> Decoder:
    """The shape and traits of a GPT-2; its vocabulary is that of the embedding, later."""
    heads, width = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    return gpt2(
        layers=metadata.integer("block_count"),
        heads=heads,
        width=width,
        vocab_size=0,
        positions=metadata.integer("context_length"),
        inner=metadata.integer("feed_forward_length", 4 * width),
        norm_epsilon=metadata.number("attention.layer_norm_epsilon", 1e-5),
    )


# Keys of models that llama.cpp computes in another way; value: where it is the usual way.
_LLAMA_ONLY = {"expert_count": 0, "attention.clamp_kqv": 0, "attention.scale": 0}


def llama_decoder(metadata: Metadata) -> Decoder:
    """The shape and traits of a Llama; its vocabulary is that of the embedding, later."""
    for key, usual in _LLAMA_ONLY.items():
        if metadata.of_model(key) not in (None, usual):
            value = metadata.of_model(key)
            raise CheckpointError(f"GGUF: llama.{key} = {value!r} is not supported")
    layers, heads = metadata.integer("block_count"), metadata.integer("attention.head_count")
    width, positions = metadata.integer("embedding_length"), metadata.integer("context_length")
    head_width = metadata.integer("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := metadata.integer(key, head_width)) != head_width:
            raise CheckpointError(f"GGUF: llama.{key} is {size}, heads are {head_width} wide")
    if metadata.integer("attention.sliding_window", positions) < positions:
        raise CheckpointError("GGUF: attention in a sliding window is not supported")
    return Decoder(
        architecture="llama",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=metadata.integer("attention.head_count_kv", heads),
        head_width=head_width,
        inner=metadata.integer("feed_forward_length"),
        vocab_size=0,
        positions=positions,
        norm="rms",
        norm_epsilon=metadata.number("attention.layer_norm_rms_epsilon"),
        position="rotary",
        rope_theta=metadata.number("rope.freq_base", 10000.0),
        mlp="gated",
        activation="silu",
        attention_scale=(head_width**-0.5,) * layers,
        tied=False,
        rope_factors=_linear_factors(metadata, head_width),
    )


def _linear_factors(metadata: Metadata, head_width: int) -> tuple[float, ...]:
    kind = metadata.of_model("rope.scaling.type") or "none"
    if kind == "none":
        return ()
    if kind != "linear":
        raise CheckpointError(f"GGUF: rope.scaling.type {kind!r} is not supported", "only linear")
    return (metadata.number("rope.scaling.factor"),) * (head_width // 2)


ARCHITECTURES: Mapping[str, tuple[Callable[[Metadata], Decoder], Parts]] = {
    "gpt2": (gpt2_decoder, GPT2_PARTS),
    "llama": (llama_decoder, LLAMA_PARTS),
}


def read_gguf(file: Path) -> GgufModel:
    """Reads and checks a GGUF file.

    Raises CheckpointError for what cannot be converted, DependencyMissing.
    """
    reader = _opened(file)
    metadata = Metadata({name: field.contents() for name, field in reader.fields.items()})
    if metadata.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.name}: architecture {metadata.architecture!r} cannot be converted",
            f"known: {', '.join(ARCHITECTURES)}",
        )
    of_metadata, parts = ARCHITECTURES[metadata.architecture]
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{file.name}: missing token_embd.weight")
    decoder = replace(
        of_metadata(metadata),
        vocab_size=int(stored["token_embd.weight"].shape[-1]),
        tied="output.weight" not in stored,
    )
    if factors := stored.pop(ROPE_FACTORS, None):
        decoder = replace(decoder, rope_factors=tuple(map(float, _as_float32(file, factors))))
    return GgufModel(decoder, _tensors(file, decoder, parts, stored), metadata)


def _opened(file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise DependencyMissing(
            "reading a GGUF file needs gguf", "pip install 'edge-slm[convert]'"
        ) from None
    try:
        return GGUFReader(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except Exception as error:  # a torn file ends in whatever reading beyond its end raises
        raise CheckpointError(f"{file} is not a GGUF file: {first_line(error)}") from None


def _tensors(
    file: Path, decoder: Decoder, parts: Parts, stored: dict[str, ReaderTensor]
) -> dict[str, Float32]:
    shapes, tensors, faults = decoder.shapes(), dict[str, Float32](), list[str]()
    for name, names in stored_names(decoder, parts):
        missing = [f"missing {one}" for one in names if one not in stored]
        found = [stored.pop(one) for one in names if one in stored]
        if not found and name.endswith(".bias") and "norm" not in name:
            tensors[name] = np.zeros(shapes[name], np.float32)
            continue
        if missing:
            faults += missing
            continue
        tensors[name] = joined(decoder, {t.name: _as_float32(file, t) for t in found})
        if tensors[name].shape != shapes[name]:
            faults.append(
                f"{found[0].name} makes a {name} of {list(tensors[name].shape)}, "
                f"its metadata {list(shapes[name])}"
            )
        elif not np.isfinite(tensors[name]).all():
            faults.append(f"{found[0].name} has values that are not finite")
    faults += [f"unexpected {name}" for name in stored]
    if faults:
        raise CheckpointError(f"{file.name}: {'; '.join(faults)}")
    return tensors


def _as_float32(file: Path, tensor: ReaderTensor) -> Float32:
    from gguf.quants import dequantize

    kind = tensor.tensor_type.name
    if kind not in TYPES:
        raise CheckpointError(
            f"{file.name}: {tensor.name} is stored as {kind}", f"known: {', '.join(TYPES)}"
        )
    values: Float32 = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    return values
