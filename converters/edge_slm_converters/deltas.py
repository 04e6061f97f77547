"""Adapters of a checkpoint: read from the folders that Hugging Face's peft writes, and merged.

peft keeps, of each adapted layer, lora_A [rank, inputs] and lora_B [outputs, rank]; what it adds
to the weight [outputs, inputs] is lora_B·lora_A times alpha / rank, or alpha / √rank with rsLoRA
(Kalajdzievski, arXiv 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_converters.architectures import architecture_of
from edge_slm_converters.arrays import Array, Float32
from edge_slm_converters.checkpoint import Checkpoint, read_tensors
from edge_slm_converters.json_files import read_json
from edge_slm_runtime.decoder import LARGEST, Decoder
from edge_slm_runtime.deltas import Delta, Factors
from edge_slm_runtime.errors import AdapterInvalid, CheckpointError, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings by their values that change nothing beside the factors; null is one of each.
_ALLOWED: Mapping[str, Sequence[Any]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base
}
_OFF = (  # settings that are false, or empty
    "use_dora use_qalora use_bdlora lora_bias rank_pattern alpha_pattern modules_to_save "
    "trainable_token_indices target_parameters layer_replication alora_invocation_tokens "
    "arrow_config"
).split()


def read_adapter(path: str | Path, source: Checkpoint, name: str = "", task: str = "") -> Delta:
    """The adapter of `source` in a file (`edge_slm_runtime.deltas`) or in a folder of peft.

    name, task: in the place of its own; a folder has its own name, and no task.
    Raises AdapterInvalid, CheckpointError, DependencyMissing.
    """
    path = Path(path)
    if path.is_dir():
        factors = _read_peft(path, source.decoder)
        delta = Delta(name or path.resolve().name, task, source.base, factors)
    else:
        delta = Delta.read(path)
        delta = replace(delta, name=name or delta.name, task=task or delta.task)
    delta.check(source.decoder, source.form, source.base)
    return delta


def merged(source: Checkpoint, deltas: Sequence[Delta]) -> Checkpoint:
    """`source` with the changes of all `deltas` in its weights: a checkpoint like any other.

    Raises AdapterInvalid for one that was made for other weights, or of a name that comes twice.
    """
    base, tensors, digests = source.base, dict(source.tensors), dict[str, str]()
    for delta in deltas:
        delta.check(source.decoder, source.form, base)
        if delta.path in digests:
            raise AdapterInvalid(f"two adapters are named {delta.name}")
        digests[delta.path] = delta.digest
        for matrix in delta.factors:
            name = f"{matrix}.weight"
            tensors[name] = tensors[name] + delta.of(matrix)
    return replace(source, tensors=tensors, merged=digests)


def _read_peft(folder: Path, decoder: Decoder) -> dict[str, Factors]:
    """Raises CheckpointError, naming the setting or tensor that cannot be converted."""
    config = read_json(folder / CONFIG)
    for key, value in config.items():
        allowed = value is None or value in _ALLOWED.get(key, (value,))
        if not allowed or (key in _OFF and value):
            raise CheckpointError(f"{CONFIG}: {key} = {shown(value)} cannot be converted")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS}", "pickled weights are not opened")
    scale, prefix = _scale(config), architecture_of({"model_type": decoder.architecture}).PREFIX
    layers: dict[str, dict[str, Float32]] = {}
    for name, tensor in read_tensors(folder / WEIGHTS):
        layer, _, part = name.removeprefix(_PREFIX).removeprefix(prefix).rpartition(".lora_")
        layers.setdefault(layer, {})[part] = tensor
    pairs = {}
    for layer, parts in layers.items():
        if set(parts) != {"A.weight", "B.weight"}:
            raise CheckpointError(f"{WEIGHTS}: {layer} has lora_{', lora_'.join(sorted(parts))}")
        if len(parts["A.weight"]) != config["r"]:
            raise CheckpointError(f"{WEIGHTS}: {layer} is not of rank {config['r']}")
        pairs[layer] = parts["A.weight"], parts["B.weight"] * np.float32(scale)
    return factors_of(decoder, pairs)


def factors_of(
    decoder: Decoder, layers: Mapping[str, tuple[Float32, Float32]]
) -> dict[str, Factors]:
    """Canonical factors of adapted layers of Hugging Face's model of `decoder`.

    layers: by the names of its modules, without the architecture's prefix, lora_A [rank, inputs]
    and lora_B [outputs, rank], which has every scale in it. Raises CheckpointError for layers
    that cannot be converted.
    """
    left, found = dict(layers), {}
    settings = {"model_type": decoder.architecture}
    layout = architecture_of(settings).layout(decoder, settings)
    for matrix, (inputs, outputs) in decoder.matrices().items():
        place, start, parts = layout[f"{matrix}.weight"], 0, []
        for name, shape in zip(place.names, place.shapes, strict=True):
            layer, size = name.removesuffix(".weight"), shape[0 if place.outputs_first else 1]
            if layer in left:
                a, b = left.pop(layer)
                _check(layer, a, b, inputs, size)
                parts.append((a.T, np.pad(b.T, ((0, 0), (start, outputs - start - size)))))
            start += size
        if parts:
            found[matrix] = _as_halves(
                np.concatenate([a for a, _ in parts], 1), np.concatenate([b for _, b in parts])
            )
    if left or not found:
        raise CheckpointError(
            f"an adapter of {min(left, default='no layer')} cannot be converted",
            "those of attention and of the feed-forward layer can",
        )
    return found


def _check(layer: str, a: Float32, b: Float32, inputs: int, outputs: int) -> None:
    """Raises CheckpointError."""
    if a.ndim != 2 or a.shape[1] != inputs or b.shape != (outputs, len(a)):
        raise CheckpointError(
            f"{layer} has lora_A and lora_B of {list(a.shape)}, {list(b.shape)}, "
            f"the layer is [{outputs}, {inputs}]"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise CheckpointError(f"{layer} has values that are not finite")


def _scale(config: Mapping[str, Any]) -> float:
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    numbers = isinstance(rank, int) and isinstance(alpha, int | float)
    if not numbers or not (1 <= rank <= LARGEST and 0 < alpha <= LARGEST):
        raise CheckpointError(f"{CONFIG}: r is {shown(rank)}, lora_alpha {shown(alpha)}")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _as_halves(a: Float32, b: Float32) -> Factors:
    """In half precision; powers of two are moved between a column of a and its row of b, so that
    both are of like size and neither is lost below the smallest number."""
    peaks = np.abs(a).max(0), np.abs(b).max(1)
    logs = [np.log2(np.where(peak > 0, peak, 1)) for peak in peaks]
    shift = np.where((peaks[0] > 0) & (peaks[1] > 0), np.rint((logs[1] - logs[0]) / 2), 0)
    with np.errstate(over="ignore"):  # refused as not finite
        halves: list[Array] = [
            np.ldexp(a, shift.astype(int)).astype(np.float16),
            np.ldexp(b, -shift.astype(int)[:, None]).astype(np.float16),
        ]
    return Factors(*halves)
