"""Checks a CTranslate2 `model.bin` before the engine sees it: names, types and shapes.

The engine multiplies what the file says, and reads or writes beyond its memory when sizes do
not fit together. The file may only hold the variables that our converter writes for a model of
this shape, each of its size.

Layout, little-endian: u32 version, name of the specification, u32 its revision, u32 count of
variables; each a name, u8 rank, u32 sizes, u8 type, u32 bytes, data; u32 count of aliases; each
two names. A name is u16 its bytes and these, the last of them zero.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

from edge_slm_runtime.decoder import Decoder

VERSION, SPECIFICATION, REVISION = 6, "TransformerDecoderSpec", 8
_FLOAT, _INT8 = 0, 1
_TYPES = ("f", "b", "h", "i")  # by number, as struct's
Shape = tuple[int, ...]


def check_model(path: Path, decoder: Decoder, precision: str) -> None:
    """Raises ValueError for a file that does not hold `decoder`, OSError."""
    shapes, scalars = _shapes(decoder, precision), _scalars(decoder)
    with path.open("rb") as file:
        reader = _Reader(file)
        head = reader.number("I"), reader.name(), reader.number("I")
        if head != (VERSION, SPECIFICATION, REVISION):
            raise ValueError(f"it is {head}")
        found: dict[str, int] = {}  # name → type
        for _ in range(reader.count(len(shapes) + len(scalars))):
            name, shape, kind, size = reader.variable()
            if name in found or (name not in shapes and name not in scalars):
                raise ValueError(f"variable {name}")
            if shape != shapes.get(name, ()) or size != prod(shape) * struct.calcsize(_TYPES[kind]):
                raise ValueError(f"{name} has shape {shape} and {size} bytes")
            found[name] = kind
            if name in shapes:
                matrix = name.endswith("/weight") and precision == "int8"
                if kind != (_INT8 if matrix else _FLOAT):
                    raise ValueError(f"{name} is of type {kind}")
                reader.skip(size)
            elif not scalars[name](value := reader.number(_TYPES[kind])):
                raise ValueError(f"{name} is {value}")
        for _ in range(reader.count(len(shapes) + len(scalars))):
            alias, name = reader.name(), reader.name()
            if alias in found or name not in found or shapes.get(alias) != shapes.get(name, ()):
                raise ValueError(f"alias {alias}")
            found[alias] = found[name]
            if f"{name}_scale" in found:  # which the engine takes with it
                found[f"{alias}_scale"] = _FLOAT
        if not reader.ended():
            raise ValueError("more than a model")
    if missing := {*shapes, *_needed(decoder)} - {*found}:
        raise ValueError(f"no {min(missing)}")


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def bytes(self, count: int) -> bytes:
        content = self._file.read(count)
        if len(content) != count:
            raise ValueError("cut short")
        return content

    def number(self, kind: str) -> int | float:
        (value,) = struct.unpack("<" + kind, self.bytes(struct.calcsize(kind)))
        return value  # type: ignore[no-any-return]

    def count(self, most: int) -> int:
        count = int(self.number("I"))
        if count > most:
            raise ValueError(f"{count} of at most {most}")
        return count

    def name(self) -> str:
        content = self.bytes(int(self.number("H")))
        if content[-1:] != b"\0" or not content[:-1].isascii():
            raise ValueError(f"name {content[:80]!r}")
        return content[:-1].decode("ascii")

    def variable(self) -> tuple[str, Shape, int, int]:
        """(name, shape, type, bytes); its data follow."""
        name = self.name()
        rank = int(self.number("B"))
        shape = tuple(int(self.number("I")) for _ in range(rank))
        kind, size = int(self.number("B")), int(self.number("I"))
        if kind >= len(_TYPES):
            raise ValueError(f"{name} is of type {kind}")
        return name, shape, kind, size

    def skip(self, count: int) -> None:
        if self._file.seek(count, os.SEEK_CUR) > self._size:
            raise ValueError("cut short")

    def ended(self) -> bool:
        return self._file.tell() == self._size


def _shapes(decoder: Decoder, precision: str) -> dict[str, Shape]:
    """Of all tensors."""
    d = decoder
    up = {"ffn/linear_0": (d.inner, d.width)}
    if d.mlp == "gated":
        up["ffn/linear_0_noact"] = d.inner, d.width
    linears = {
        "self_attention/linear_0": (d.attention_width + 2 * d.kv_width, d.width),
        "self_attention/linear_1": (d.width, d.attention_width),
        **up,
        "ffn/linear_1": (d.width, d.inner),
    }
    norm = ("gamma", "beta") if d.norm == "layer" else ("gamma",)
    matrices: dict[str, Shape] = dict.fromkeys(
        ("embeddings", "projection"), (d.vocab_size, d.width)
    )
    shapes: dict[str, Shape] = {f"layer_norm/{part}": (d.width,) for part in norm}
    if d.position == "learned":
        shapes["position_encodings/encodings"] = d.positions, d.width
    for i in range(d.layers):
        for name, shape in linears.items():
            matrices[f"layer_{i}/{name}"] = shape
            shapes[f"layer_{i}/{name}/bias"] = shape[:1]
        for place in ("self_attention", "ffn"):
            shapes |= {f"layer_{i}/{place}/layer_norm/{part}": (d.width,) for part in norm}
        if len(set(d.rope_factors)) > 1:
            for part in ("long", "short"):
                factors = f"layer_{i}/self_attention/rotary_scaling_{part}_factor"
                shapes[factors] = (d.head_width // 2,)
    for name, matrix in matrices.items():
        shapes[f"{name}/weight"] = matrix
        if precision == "int8":
            shapes[f"{name}/weight_scale"] = matrix[:1]
    return {f"decoder/{name}": shape for name, shape in shapes.items()}


def _scalars(decoder: Decoder) -> dict[str, Callable[[int | float], bool]]:
    """Name → whether a value may be. Which of them are there depends on the model."""
    d = decoder

    def among(*values: int) -> Callable[[int | float], bool]:
        return lambda value: value in values

    of_model: Mapping[str, Callable[[int | float], bool]] = {
        "activation": among(*range(7)),
        "alignment_heads": among(1),
        "alignment_layer": among(-1),
        "num_heads": among(d.heads),
        "pre_norm": among(1),
        **dict.fromkeys(
            ("alibi", "alibi_use_positive_positions", "scale_alibi", "scale_embeddings"), among(0)
        ),
        "start_from_zero_embedding": among(0),
    }
    of_layer: Mapping[str, Callable[[int | float], bool]] = {
        "head_dim": among(d.head_width),
        "num_heads_kv": among(d.kv_heads),
        "queries_scale": math.isfinite,
        "rotary_base": math.isfinite,
        "rotary_dim": among(0),
        "rotary_interleave": among(0),
        "rotary_scaling_factor": math.isfinite,
        "rotary_scaling_type": among(0, 1),
        "original_max_position_embeddings": among(d.positions),
        "max_position_embeddings": among(d.positions),
    }
    return {f"decoder/{name}": allowed for name, allowed in of_model.items()} | {
        f"decoder/layer_{i}/self_attention/{name}": allowed
        for i in range(d.layers)
        for name, allowed in of_layer.items()
    }


def _needed(decoder: Decoder) -> set[str]:
    """Scalars without which the engine would take other sizes."""
    names = []
    if decoder.kv_heads != decoder.heads:
        names.append("num_heads_kv")
    if decoder.attention_width != decoder.width:
        names.append("head_dim")
    if decoder.position == "rotary":
        names.append("rotary_dim")
    layers = range(decoder.layers)
    return {"decoder/num_heads"} | {
        f"decoder/layer_{i}/self_attention/{name}" for i in layers for name in names
    }
