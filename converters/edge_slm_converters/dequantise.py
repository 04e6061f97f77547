"""The checkpoint of a bundle: the weights that it computes with, in the Hugging Face layout.

Of the ONNX variant with most bits; blocks of 4 or 8 bits give back what they stand for, so the
checkpoint computes what the variant does (up to its rounding of activations), not what was
quantised. It can be trained further, teach another model, or become other variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_slm_converters.arrays import Array, Float32
from edge_slm_converters.blocks import BYTE_ZERO, Blocks
from edge_slm_converters.hugging_face import write_weights
from edge_slm_converters.onnx_writer import MODEL_FILE, import_onnx
from edge_slm_converters.sums import write_sums
from edge_slm_converters.text_side import OWN_SETTINGS, SCHEMA, SETTINGS
from edge_slm_runtime import verify
from edge_slm_runtime.bundle import TOKENIZER, WORDS, Manifest, Variant
from edge_slm_runtime.errors import CheckpointError
from edge_slm_runtime.files import write_folder_aside, write_json
from edge_slm_runtime.panels import stored_name

_MOST_BITS_FIRST = ("fp32", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Stored:
    """The canonical tensors, biases that a model does not have as zeros, and by canonical name
    the blocks of those matrices [K,N] that are stored in blocks."""

    tensors: Mapping[str, Float32]
    blocks: Mapping[str, Blocks]


def write_checkpoint_of(bundle: Path, target: Path) -> Variant:
    """Writes the folder `target`: config.json, fp16 weights, tokenizer, command.json, the lexicon
    and, where the bundle says how it was trained, recipe.json. Returns the variant it is of.

    Raises what `verify` raises, CheckpointError for a bundle without an ONNX variant or without
    commands (its chat template is not in it), TargetExists, DependencyMissing.
    """
    manifest = verify(bundle)
    found = {v.precision: v for v in manifest.variants if v.engine == "onnxruntime"}
    variant = next((found[p] for p in _MOST_BITS_FIRST if p in found), None)
    if variant is None:
        raise CheckpointError(f"{bundle} has no ONNX variant")
    schema = manifest.prompt.schema
    if schema is None:
        raise CheckpointError(
            f"{bundle} obeys no commands", "start from the model's own checkpoint"
        )
    tensors = stored(bundle, manifest, variant).tensors
    with write_folder_aside(target) as folder:
        write_weights(folder, manifest.model, tensors, np.float16)
        (folder / TOKENIZER).write_bytes((bundle / TOKENIZER).read_bytes())
        write_json(OWN_SETTINGS, folder / SETTINGS)
        write_json(schema.to_json(), folder / SCHEMA)
        if (bundle / WORDS).is_file():
            (folder / WORDS).write_bytes((bundle / WORDS).read_bytes())
        if recipe := manifest.provenance.get("recipe"):
            write_json(recipe, folder / "recipe.json")
        write_sums(folder)
    return variant


def stored(bundle: Path, manifest: Manifest, variant: Variant) -> Stored:
    """What is in an ONNX variant. Raises DependencyMissing."""
    onnx = import_onnx()
    initializers = onnx.load(str(bundle / variant.path / MODEL_FILE)).graph.initializer
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in initializers}
    tensors: dict[str, Float32] = {}
    blocks: dict[str, Blocks] = {}
    for name, shape in manifest.model.shapes().items():
        matrix = name.removesuffix(".weight")
        is_table = name in ("embedding", "head.weight")
        if not is_table and (len(shape) != 2 or name == "positions"):
            given = "wpe.weight" if name == "positions" else stored_name(name)
            values = constants.get(given, np.zeros(shape, np.float32))
        elif f"{stored_name(matrix)}.scale" not in constants:
            values = constants[f"{stored_name(matrix)}.weight"]
        else:
            inputs = shape[1] if is_table else shape[0]
            blocks[matrix] = _blocks(constants, stored_name(matrix), inputs)
            values = blocks[matrix].matrix()
            values = values.T if is_table else values
        tensors[name] = np.asarray(values[: shape[0]], np.float32).reshape(shape)
    return Stored(tensors, blocks)


def _blocks(constants: Mapping[str, Array], name: str, inputs: int) -> Blocks:
    """The inverse of `Blocks.packed`, of which a table [rows, width] may be a flat form."""
    scale = constants[f"{name}.scale"]
    levels, bits = constants[f"{name}.weight"].reshape(*scale.shape, -1), 8
    zero: Array = np.full_like(scale, BYTE_ZERO)
    if f"{name}.zero" in constants:
        levels, bits = _apart(levels), 4
        zero = _apart(constants[f"{name}.zero"])[:, : scale.shape[1]].astype(np.float32)
    steps = levels.astype(np.float32) - zero[..., None]
    steps = steps.reshape(len(scale), -1)[:, :inputs].T
    return Blocks(bits, levels.shape[-1], steps, scale.T, zero.T)


def _apart(pairs: Array) -> Array:
    """Two values of 4 bits a byte, the first in the lower half, along the last axis."""
    both = np.stack((pairs & 15, pairs >> 4), -1)
    apart: Array = both.reshape(*pairs.shape[:-1], -1)
    return apart
