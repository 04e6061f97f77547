"""Writes the weights as the numba engine multiplies with them (`edge_slm_runtime.panels`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_slm_converters.blocks import Blocks
from edge_slm_converters.checkpoint import Array, Checkpoint, Float32, GPT2Config
from edge_slm_converters.quantise import PRECISIONS, Precision, Quantised
from edge_slm_runtime.decoder import Decoder, gpt2
from edge_slm_runtime.engines.numba_engine import NumbaEngine
from edge_slm_runtime.errors import CheckpointError, DependencyMissing
from edge_slm_runtime.panels import ALIGNMENT, UNIT, file_metadata, pack_levels, pack_outputs

_MATRIX_PARTS = (".levels", ".scale", ".zero")


def write_panels(checkpoint: Checkpoint, precision: str | Precision, folder: Path) -> int:
    """Writes `folder/model.safetensors`: the matrices of `precision`, int8 or what `mixed`
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
    config = checkpoint.config
    settings = file_metadata(_decoder(config))
    tensors = dict(_tensors(checkpoint, precision))
    embedding = () if config.tied else ("wte.levels", "wte.scale")
    read = (n for n in tensors if n.endswith(_MATRIX_PARTS) and n not in embedding)
    header, data = _split(save(tensors, settings))
    header += b" " * (-(8 + len(header)) % ALIGNMENT)  # so that data can be mapped into memory
    with (folder / NumbaEngine.main_file).open("wb") as file:
        file.writelines((len(header).to_bytes(8, "little"), header, data))
    return sum(tensors[name].nbytes for name in read)


def _decoder(config: GPT2Config) -> Decoder:
    return gpt2(
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        vocab_size=config.vocab_size,
        positions=config.positions,
        norm_epsilon=config.layer_norm_epsilon,
        activation=config.activation,
    )


def _split(content: bytes) -> tuple[bytes, memoryview]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], memoryview(content)[end:]


def _tensors(checkpoint: Checkpoint, precision: Quantised) -> Iterator[tuple[str, Array]]:
    config, given = checkpoint.config, checkpoint.tensors
    yield from _matrix("wte", precision.of("wte", given["wte.weight"].T))
    if not config.tied:
        yield from _matrix("lm_head", precision.of("lm_head", checkpoint.head.T))
    yield "wpe", _filled(given["wpe.weight"].ravel())
    for name in ("ln_f.weight", "ln_f.bias"):
        yield name, _filled(given[name])
    for i in range(config.layers):
        for norm in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            yield f"h.{i}.{norm}", _filled(given[f"h.{i}.{norm}"])
    for name in config.matrices():
        # The queries' factor, put where it costs nothing.
        factor = np.ones(given[f"{name}.bias"].shape, np.float32)
        if name.endswith("attn.c_attn"):
            layer = int(name.split(".")[1])
            factor[: config.width] = config.attention_scale[layer]
        yield from _matrix(name, precision.of(name, given[f"{name}.weight"]), factor)
        yield f"{name}.bias", _filled(given[f"{name}.bias"] * factor)


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
    scale = np.pad(scale, ((0, 0), (0, columns))).astype(np.float16)
    yield f"{name}.scale", pack_outputs(scale)
    if blocks.bits == 4:
        yield f"{name}.zero", pack_outputs(zero.astype(np.uint8))


def _filled(vector: Float32) -> Float32:
    return np.pad(vector, (0, -len(vector) % UNIT))
