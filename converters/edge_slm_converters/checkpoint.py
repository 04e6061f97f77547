"""Reads a checkpoint in the Hugging Face layout, without torch.

A checkpoint is a folder: `config.json`, the weights as `model.safetensors` (or
shards named by `model.safetensors.index.json`), `tokenizer.json` and
`command.json`. Weights come out under their canonical names (`edge_slm_runtime.decoder`),
as float32 numpy arrays whatever they were stored as. Pickled weights are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_converters.architectures import architecture_of
from edge_slm_converters.architectures.base import Architecture, Layout, canonical
from edge_slm_converters.arrays import Float32
from edge_slm_runtime.bundle import file_entry
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError, DependencyMissing, ManifestInvalid
from edge_slm_runtime.prompt import PromptForm
from edge_slm_runtime.text import TextCodec

HEAD = "lm_head.weight"  # in every architecture


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked checkpoint: every tensor is there, has its shape, and is finite.

    tensors: the canonical ones of `decoder`. parameters: how many values are stored, those
    of a tied embedding once. tokens: the tokenizer's, in id order; ids above them are padding
    of the vocabulary.
    """

    path: Path
    decoder: Decoder
    tensors: Mapping[str, Float32]
    parameters: int
    schema: CommandSchema
    codec: TextCodec
    tokens: tuple[str, ...]

    @property
    def head(self) -> Float32:
        """The LM head, [vocabulary, width]; the embedding itself when tied."""
        return self.tensors["embedding" if self.decoder.tied else "head.weight"]

    def digests(self) -> dict[str, str]:
        """sha256 of every file that the conversion reads."""
        names = [
            "config.json",
            "tokenizer.json",
            "command.json",
            *(p.name for p in weight_files(self.path)),
        ]
        return {name: file_entry(self.path / name).sha256 for name in names}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and checks the folder `path`.

    Raises CheckpointError (it names everything that is wrong with the tensors at
    once), DependencyMissing.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint folder")
    config = read_json(path / "config.json")
    architecture = architecture_of(config)
    decoder = architecture.decoder(config)
    layout = architecture.layout(decoder, config)
    stored = _stored_tensors(path, architecture, layout)
    return Checkpoint(
        path,
        decoder,
        canonical(layout, decoder, stored),
        sum(tensor.size for tensor in stored.values()),
        *_read_text_side(path, decoder),
    )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises CheckpointError when there are none."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index.name} has no weight_map")
        names = {str(name) for name in weight_map.values()}
        if escaping := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{index.name}: {escaping[0]!r} leaves the checkpoint folder")
        files = sorted(path / name for name in names)
    else:
        files = [path / "model.safetensors"]
    if missing := [file.name for file in files if not file.is_file()]:
        hint = ""
        if list(path.glob("*.bin")) + list(path.glob("*.pt")) + list(path.glob("*.pth")):
            hint = "pickled weights are not opened; save with safe_serialization=True"
        raise CheckpointError(f"{path}: no {', '.join(missing)}", hint)
    return files


def _read_tensors(file: Path, skipped: tuple[str, ...]) -> Iterator[tuple[str, Float32]]:
    """skipped: endings of names."""
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError:
        raise DependencyMissing(
            "reading a checkpoint needs safetensors", "pip install 'edge-slm[convert]'"
        ) from None
    try:
        entries = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from None
    for name, entry in entries:
        if not name.endswith(skipped):
            yield name, _as_float32(f"{file.name}: {name}", entry)


def _as_float32(where: str, entry: Mapping[str, Any]) -> Float32:
    raw, dtype = entry["data"], entry["dtype"]
    if dtype == "BF16":  # the upper half of a float32; numpy has no such type
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype in ("F16", "F32", "F64"):
        values = np.frombuffer(raw, f"<f{int(dtype[1:]) // 8}").astype(np.float32)
    else:
        raise CheckpointError(f"{where} is stored as {dtype}", "convert it to fp16, bf16 or fp32")
    return np.asarray(values.reshape(entry["shape"]), np.float32)


def _stored_tensors(path: Path, architecture: Architecture, layout: Layout) -> dict[str, Float32]:
    """The tensors of all files, by the names of `layout`. Raises CheckpointError, naming
    everything that is wrong with them."""
    found: dict[str, Float32] = {}
    for file in weight_files(path):
        for name, tensor in _read_tensors(file, architecture.BUFFERS):
            found[name.removeprefix(architecture.PREFIX)] = tensor
    _drop_tied_head(found, layout)
    shapes = {
        name: shape
        for place in layout.values()
        for name, shape in zip(place.names, place.shapes, strict=True)
    }
    faults = [f"missing {name}" for name in shapes if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in shapes]
    for name, shape in shapes.items():
        if name in found and found[name].shape != shape:
            faults.append(f"{name} is {list(found[name].shape)}, config.json says {list(shape)}")
        elif name in found and not np.isfinite(found[name]).all():
            faults.append(f"{name} has values that are not finite")
    if faults:
        raise CheckpointError(f"{path}: {'; '.join(faults)}")
    return found


def _drop_tied_head(tensors: dict[str, Float32], layout: Layout) -> None:
    """Removes the second copy of a tied embedding. Raises CheckpointError when it differs."""
    if "head.weight" in layout or (head := tensors.pop(HEAD, None)) is None:
        return
    (name,) = layout["embedding"].names
    if name in tensors and not np.array_equal(head, tensors[name]):
        raise CheckpointError(
            f"{HEAD} differs from {name}, but config.json ties them",
            'set "tie_word_embeddings": false',
        )


def read_schema(path: Path) -> CommandSchema:
    """The command schema of the checkpoint folder `path`. Raises CheckpointError."""
    try:
        return CommandSchema.from_json(read_json(path / "command.json"))
    except ManifestInvalid as error:
        raise CheckpointError(f"{path / 'command.json'}: {error.problem}") from None


def _read_text_side(
    path: Path, decoder: Decoder
) -> tuple[CommandSchema, TextCodec, tuple[str, ...]]:
    """The command schema, the text codec, and the tokens in id order."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    schema = read_schema(path)
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    try:
        codec = TextCodec(file, PromptForm.commanded(schema))
    except ManifestInvalid as error:
        raise CheckpointError(f"{path}: {error.problem}") from None
    vocabulary = sorted(
        Tokenizer.from_file(str(file)).get_vocab().items(), key=lambda item: item[1]
    )
    tokens = tuple(token for token, _ in vocabulary)
    if [id_ for _, id_ in vocabulary] != list(range(len(tokens))):
        raise CheckpointError(f"{file}: token ids have gaps")
    if len(tokens) > decoder.vocab_size:
        raise CheckpointError(
            f"tokenizer.json has {len(tokens)} tokens, the model {decoder.vocab_size}"
        )
    return schema, codec, tokens


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return data
