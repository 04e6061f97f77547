"""The checkpoint of a bundle: the weights that it computes with, in the Hugging Face layout.

Of the ONNX variant with most bits; blocks of 4 or 8 bits give back what they stand for, so the
checkpoint computes what the variant does (up to its rounding of activations), not what was
quantised. It can be trained further, teach another model, or become other variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_converters.arrays import Array, Float32
from edge_slm_converters.blocks import BYTE_ZERO
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
    tensors = _tensors(bundle / variant.path / MODEL_FILE, manifest)
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


def _tensors(model: Path, manifest: Manifest) -> dict[str, Float32]:
    """The canonical tensors; biases that a model does not have are zeros."""
    onnx = import_onnx()
    initializers = onnx.load(str(model)).graph.initializer
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in initializers}
    tensors = {}
    for name, shape in manifest.model.shapes().items():
        if name in ("embedding", "head.weight"):
            values = _rows(constants, stored_name(name.removesuffix(".weight")))
        elif len(shape) == 2 and name != "positions":
            values = _matrix(constants, stored_name(name.removesuffix(".weight")))
        else:
            stored = "wpe.weight" if name == "positions" else stored_name(name)
            values = constants.get(stored, np.zeros(shape, np.float32))
        tensors[name] = np.asarray(values[: shape[0]], np.float32).reshape(shape)
    return tensors


def _rows(constants: Mapping[str, Array], name: str) -> Array:
    """A table [rows, width]."""
    weight, scale = constants[f"{name}.weight"], constants.get(f"{name}.scale")
    if scale is None:
        return weight
    return _values(weight.reshape(*scale.shape, -1), scale, BYTE_ZERO)


def _matrix(constants: Mapping[str, Array], name: str) -> Array:
    """A matrix [inputs, outputs], perhaps with inputs that fill its last block."""
    weight, scale = constants[f"{name}.weight"], constants.get(f"{name}.scale")
    if scale is None:
        return weight
    zero: Any = BYTE_ZERO
    if f"{name}.zero" in constants:
        weight = _apart(weight)
        zero = _apart(constants[f"{name}.zero"])[:, : scale.shape[1], None].astype(np.float32)
    values: Array = _values(weight, scale, zero).T
    return values


def _values(levels: Array, scale: Array, zero: Any) -> Array:
    """[outputs, inputs] of levels [outputs, blocks, size]: the inverse of `Blocks.packed`."""
    values: Array = (levels.astype(np.float32) - zero) * scale[..., None]
    return values.reshape(len(levels), -1)


def _apart(pairs: Array) -> Array:
    """Two values of 4 bits a byte, the first in the lower half, along the last axis."""
    both = np.stack((pairs & 15, pairs >> 4), -1)
    apart: Array = both.reshape(*pairs.shape[:-1], -1)
    return apart
