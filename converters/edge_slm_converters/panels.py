"""Writes the weights as the numba engine multiplies with them (`edge_slm_runtime.panels`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_slm_converters.arrays import Array, Float32
from edge_slm_converters.blocks import Blocks
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.quantise import PRECISIONS, Precision, Quantised
from edge_slm_runtime.engines.numba_engine import NumbaEngine
from edge_slm_runtime.errors import CheckpointError, DependencyMissing
from edge_slm_runtime.panels import (
    ALIGNMENT,
    UNIT,
    alternating,
    file_metadata,
    pack_levels,
    pack_outputs,
    stored_name,
)

_MATRIX_PARTS = (".levels", ".scale", ".zero")


def write_panels(checkpoint: Checkpoint, precision: str | Precision, folder: Path) -> int:
    """Writes `folder/model.safetensors`: the matrices of `precision`, int8 or what `bit_allocation`
    made, the rest in float32. Returns the bytes of weights that one decoding step reads.

    Raises CheckpointError for fp32, DependencyMissing.
    """
    try:
        from safetensors.numpy import save
    except ImportError:
        raise DependencyMissing(
            "writing this variant needs safetensors", "pip install 'edge-slm[convert]'"
        ) from None
    if isinstance(precision, str):
        precision = PRECISIONS[precision]
    if not isinstance(precision, Quantised):
        raise CheckpointError(f"the numba engine has no {precision.name}", "choose int8 or int4")
    decoder = checkpoint.decoder
    settings = file_metadata(decoder)
    tensors = dict(_tensors(checkpoint, precision))
    embedding = () if decoder.tied else ("wte.levels", "wte.scale")
    read = (n for n in tensors if n.endswith(_MATRIX_PARTS) and n not in embedding)
    header, data = _split(save(tensors, settings))
    header = _in_order(header)
    header += b" " * (-(8 + len(header)) % ALIGNMENT)  # so that data can be mapped into memory
    with (folder / NumbaEngine.main_file).open("wb") as file:
        file.writelines((len(header).to_bytes(8, "little"), header, data))
    return sum(tensors[name].nbytes for name in read)


def _split(content: bytes) -> tuple[bytes, memoryview]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], memoryview(content)[end:]


def _in_order(header: bytes) -> bytes:
    """With its metadata sorted: safetensors writes them in no fixed order."""
    entries = json.loads(header)
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    return json.dumps(entries, separators=(",", ":")).encode()


def _tensors(checkpoint: Checkpoint, precision: Quantised) -> Iterator[tuple[str, Array]]:
    decoder, given = checkpoint.decoder, checkpoint.tensors
    yield from _matrix("wte", precision.of("embedding", given["embedding"].T))
    if not decoder.tied:
        yield from _matrix("lm_head", precision.of("head", checkpoint.head.T))
    if decoder.position == "learned":
        yield "wpe", _filled(given["positions"].ravel())
    for name, tensor in given.items():
        if "norm." in name:
            yield stored_name(name), _filled(tensor)
    for name in decoder.matrices():
        weight, bias, stored = given[f"{name}.weight"], given[f"{name}.bias"], stored_name(name)
        # The queries' factor, put where it costs nothing.
        factor = np.ones(len(bias), np.float32)
        if name.endswith(".qkv"):
            layer = int(name.split(".")[1])
            factor[: decoder.attention_width] = decoder.attention_scale[layer]
        blocks, bias = precision.of(name, weight), bias * factor
        if decoder.mlp == "gated" and name.endswith(".up"):
            blocks, bias = _alternating_blocks(blocks), alternating(bias)
            factor = np.ones(len(bias), np.float32)
        yield from _matrix(stored, blocks, factor)
        yield f"{stored}.bias", _filled(bias)
        if name in checkpoint.channels:
            yield f"{stored}.channels", _filled(checkpoint.channels[name]).astype(np.float16)


def _matrix(
    name: str, blocks: Blocks, factor: Float32 | None = None
) -> Iterator[tuple[str, Array]]:
    """factor: of the outputs [N]."""
    rows = len(blocks.scale) * blocks.size - len(blocks.steps)
    columns = -blocks.steps.shape[1] % UNIT
    steps = np.pad(blocks.steps, ((0, rows), (0, columns)))
    zero = np.pad(blocks.zero, ((0, 0), (0, columns)))
    levels = steps.reshape(len(zero), blocks.size, -1) + zero[:, None]
    stored = levels.reshape(-1, steps.shape[1]).astype(np.uint8)
    scale = blocks.scale if factor is None else blocks.scale * factor
    yield f"{name}.levels", pack_levels(stored, blocks.bits, blocks.size)
    with np.errstate(over="ignore"):  # the gate refuses what becomes infinite
        scale = np.pad(scale, ((0, 0), (0, columns))).astype(np.float16)
    yield f"{name}.scale", pack_outputs(scale)
    if blocks.bits == 4:
        yield f"{name}.zero", pack_outputs(zero.astype(np.uint8))


def _alternating_blocks(blocks: Blocks) -> Blocks:
    parts = blocks.steps, blocks.scale, blocks.zero
    return Blocks(blocks.bits, blocks.size, *map(alternating, parts))


def _filled(vector: Float32) -> Float32:
    return np.pad(vector, (0, -len(vector) % UNIT))
