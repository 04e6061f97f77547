"""The contents of an architecture file: how one family stores the model of a `Decoder`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge_slm_converters.arrays import Float32
from edge_slm_converters.gguf_metadata import Metadata, Parts, Settings
from edge_slm_runtime.decoder import LARGEST, Decoder
from edge_slm_runtime.errors import CheckpointError, shown

Config = Mapping[str, Any]  # the contents of config.json


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors of a checkpoint that make up one canonical tensor.

    names: side by side along the outputs; none where the model has no such tensor and the
    canonical one is zeros. shapes: of each, as stored. outputs_first: whether linear weights
    are stored as [outputs, inputs].
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    outputs_first: bool = False


Layout = Mapping[str, Stored]  # by canonical name


class Architecture(Protocol):
    """A module of this package."""

    PREFIX: str  # that tensor names may have; a Layout has them without
    BUFFERS: tuple[str, ...]  # endings of names that are no weights

    def decoder(self, config: Config) -> Decoder:
        """Raises CheckpointError, naming the setting that cannot be converted."""

    def layout(self, decoder: Decoder, config: Config) -> Layout:
        """Of every tensor of `decoder`."""

    def config(self, decoder: Decoder, biased: Collection[str] = ()) -> dict[str, Any]:
        """The config.json that is read as this Decoder. biased: the matrices of a layer that
        have biases other than zeros. Raises CheckpointError for traits that it cannot have."""

    GGUF_PARTS: Parts
    GGUF_INTERLEAVED: tuple[str, ...]  # parts with rotary pairs side by side
    GGUF_NEEDS_BIASES: bool  # by llama.cpp, be they zeros

    def gguf_decoder(self, metadata: Metadata) -> Decoder:
        """Of the metadata of a GGUF file; vocabulary and head are those of its tensors.
        Raises CheckpointError, naming the key that cannot be converted."""

    def gguf_settings(self, decoder: Decoder) -> Settings:
        """The metadata that `gguf_decoder` and llama.cpp read as this Decoder.

        Raises CheckpointError for traits that llama.cpp does not compute.
        """


def stored(shape: tuple[int, ...], *names: str) -> Stored:
    """One tensor, stored as its canonical one; without a name, zeros."""
    return Stored(names, (shape,) * len(names))


def linear(inputs: int, outputs: Mapping[str, int]) -> Stored:
    """Linear weights side by side, name → outputs, each stored as [outputs, inputs]."""
    return Stored(tuple(outputs), tuple((n, inputs) for n in outputs.values()), outputs_first=True)


def bias(outputs: Mapping[str, int], present: bool) -> Stored:
    """Biases side by side, name → outputs."""
    if not present:
        return Stored((), ())
    return Stored(tuple(outputs), tuple((n,) for n in outputs.values()))


def canonical(
    layout: Layout, decoder: Decoder, tensors: Mapping[str, Float32]
) -> dict[str, Float32]:
    """Stored tensors → canonical ones."""
    canonical_tensors = {}
    for name, shape in decoder.shapes().items():
        place = layout[name]
        parts = [tensors[part].T if place.outputs_first else tensors[part] for part in place.names]
        if not parts:
            canonical_tensors[name] = np.zeros(shape, np.float32)
        else:
            canonical_tensors[name] = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
    return canonical_tensors


def as_stored(layout: Layout, tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """Canonical tensors → stored ones: the inverse of `canonical`."""
    stored_tensors = {}
    for name, place in layout.items():
        start = 0
        for part, shape in zip(place.names, place.shapes, strict=True):
            size = shape[0] if place.outputs_first else shape[-1]
            value = tensors[name][..., start : start + size]
            stored_tensors[part] = value.T if place.outputs_first else value
            start += size
    return stored_tensors


# -- GGUF ----------------------------------------------------------------------


def check_llama_cpp(decoder: Decoder, activation: str) -> None:
    """Raises CheckpointError for what llama.cpp does not compute in this architecture."""
    name = decoder.architecture
    if decoder.activation != activation:
        raise CheckpointError(
            f"llama.cpp's {name} has no {decoder.activation}", f"it computes {activation} alone"
        )
    if not plain_attention(decoder):
        raise CheckpointError(f"llama.cpp's {name} scales attention by head width alone")


def plain_attention(decoder: Decoder) -> bool:
    """Whether every layer divides by √(head width), as GPT-2 itself does."""
    return set(decoder.attention_scale) == {decoder.head_width**-0.5}


# -- settings of config.json --------------------------------------------------


def checked(decoder: Decoder, where: str) -> Decoder:
    """`decoder`, before anything of its size is allocated. Raises CheckpointError."""
    try:
        decoder.check()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    return decoder


def flag(config: Config, key: str, default: bool) -> bool:
    """Raises CheckpointError for what is neither true nor false."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} must be true or false, got {shown(value)}")
    return value


def positive(config: Config, key: str, *, kind: Any = int, default: float | None = None) -> Any:
    """A number above zero, not too large; null means the default. Raises CheckpointError."""
    value: Any = default if config.get(key) is None else config[key]
    number = isinstance(value, kind) and not isinstance(value, bool)
    most = LARGEST if kind is int else sys.float_info.max
    if not number or not 0 < value <= most:
        allowed = f"a positive number up to {most:.7g}"
        raise CheckpointError(f"config.json: {key} must be {allowed}, got {shown(value)}")
    return value


def refuse_unless(config: Config, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Settings that would change the computation: key → values that can be converted, null
    and absence among them. Raises CheckpointError."""
    for key, values in allowed.items():
        if (value := config.get(key)) is not None and value not in values:
            raise CheckpointError(f"config.json: {key} = {value!r} cannot be converted")


# Hugging Face's names of the activations of `decoder.ACTIVATIONS`. The three spellings of
# the tanh approximation are the same formula.
_ACTIVATIONS: Mapping[str, str] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def activation(config: Config, key: str, default: str) -> str:
    """Raises CheckpointError for one that no engine has."""
    value = config.get(key, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise CheckpointError(
            f"config.json: {key} {shown(value)} cannot be converted",
            f"known: {', '.join(_ACTIVATIONS)}",
        )
    return _ACTIVATIONS[value]


def activation_name(decoder: Decoder) -> str:
    """Hugging Face's name of a Decoder's activation."""
    return next(name for name, ours in _ACTIVATIONS.items() if ours == decoder.activation)
