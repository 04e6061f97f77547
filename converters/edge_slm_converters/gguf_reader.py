"""Reads a GGUF file: its metadata as a Decoder, its tensors in canonical form.

The `gguf` package decodes quantised blocks to float32, so a converted model has the values of the
file, not those that were quantised to make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_slm_converters.architectures import GGUF_ARCHITECTURES
from edge_slm_converters.architectures.base import Architecture, checked
from edge_slm_converters.arrays import Float32
from edge_slm_converters.gguf_metadata import Metadata
from edge_slm_converters.gguf_tensors import ROPE_FACTORS, joined, stored_names
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.engines.base import first_line
from edge_slm_runtime.errors import CheckpointError, DependencyMissing

if TYPE_CHECKING:
    from gguf import ReaderTensor

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file, checked: every tensor of `decoder` is there, has its shape, and is finite.

    parameters: how many values are stored.
    """

    decoder: Decoder
    tensors: Mapping[str, Float32]
    parameters: int
    metadata: Metadata


def read_gguf(file: Path) -> GgufModel:
    """Reads and checks a GGUF file.

    Raises CheckpointError for what cannot be converted, DependencyMissing.
    """
    values, stored = _opened(file)
    metadata = Metadata(values)
    architecture = GGUF_ARCHITECTURES.get(metadata.architecture)
    if architecture is None:
        raise CheckpointError(
            f"{file.name}: architecture {metadata.architecture!r} cannot be converted",
            f"these can: {', '.join(GGUF_ARCHITECTURES)}",
        )
    if "token_embd.weight" not in stored or len(stored["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{file.name}: missing token_embd.weight")
    decoder = replace(
        architecture.gguf_decoder(metadata),
        vocab_size=int(stored["token_embd.weight"].shape[-1]),
        tied="output.weight" not in stored,
    )
    if factors := stored.pop(ROPE_FACTORS, None):
        decoder = replace(decoder, rope_factors=tuple(_as_float32(file, factors).ravel().tolist()))
    checked(decoder, file.name)
    parameters = sum(int(tensor.n_elements) for tensor in stored.values())
    return GgufModel(decoder, _tensors(file, decoder, architecture, stored), parameters, metadata)


def read_metadata(file: Path) -> Metadata:
    """The keys and values of a GGUF file of any architecture. Raises as `read_gguf`."""
    return Metadata(_opened(file)[0])


def _opened(file: Path) -> tuple[dict[str, Any], dict[str, ReaderTensor]]:
    """Values of the metadata, and tensors, by name. Raises as `read_gguf`."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise DependencyMissing(
            "reading a GGUF file needs gguf", "pip install 'edge-slm[convert]'"
        ) from None
    try:
        reader = GGUFReader(file)
        values = {name: field.contents() for name, field in reader.fields.items()}
        return values, {tensor.name: tensor for tensor in reader.tensors}
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except Exception as error:  # reading beyond the end of a torn file may raise anything
        raise CheckpointError(f"{file} is not a GGUF file: {first_line(error)}") from None


def _tensors(
    file: Path, decoder: Decoder, architecture: Architecture, stored: dict[str, ReaderTensor]
) -> dict[str, Float32]:
    shapes, tensors, faults = decoder.shapes(), dict[str, Float32](), list[str]()
    for name, names in stored_names(decoder, architecture.GGUF_PARTS):
        missing = [f"missing {one}" for one in names if one not in stored]
        present = [stored.pop(one) for one in names if one in stored]
        if not present and name.endswith(".bias") and "norm" not in name:
            tensors[name] = np.zeros(shapes[name], np.float32)
            continue
        if missing:
            faults += missing
            continue
        parts = {tensor.name: _as_float32(file, tensor) for tensor in present}
        try:
            tensors[name] = joined(decoder, parts, architecture.GGUF_INTERLEAVED)
        except ValueError as error:
            faults.append(f"{present[0].name} makes no {name}: {error}")
            continue
        if tensors[name].shape != shapes[name]:
            faults.append(
                f"{present[0].name} makes a {name} of {list(tensors[name].shape)}, "
                f"its metadata {list(shapes[name])}"
            )
        elif not np.isfinite(tensors[name]).all():
            faults.append(f"{present[0].name} has values that are not finite")
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
    try:
        values: Float32 = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except ValueError as error:
        raise CheckpointError(f"{file.name}: {tensor.name} cannot be read: {error}") from None
    return values
