"""Reads a checkpoint in the Hugging Face layout or as a GGUF file, without torch.

A checkpoint folder has `config.json`, the weights as `model.safetensors` (or shards named by
`model.safetensors.index.json`), `tokenizer.json`, and `command.json` where the model obeys
commands; one that we wrote has the sums of its files (`sums`). Weights come out under their
canonical names (`edge_slm_runtime.decoder`), as float32 numpy arrays whatever they were stored as.
Pickled weights are never opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_converters.architectures import architecture_of
from edge_slm_converters.architectures.base import Architecture, Layout, canonical, checked
from edge_slm_converters.arrays import Float32
from edge_slm_converters.gguf_reader import read_gguf
from edge_slm_converters.json_files import read_json
from edge_slm_converters.sums import check_sums
from edge_slm_converters.text_side import TOKENIZER, TextSide, of_folder, of_gguf
from edge_slm_runtime.bundle import file_entry
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.deltas import base_digest
from edge_slm_runtime.errors import CheckpointError, DependencyMissing, OutOfMemory
from edge_slm_runtime.prompt import PromptForm
from edge_slm_runtime.text import TextCodec

CONFIG = "config.json"
HEAD = "lm_head.weight"  # in every architecture
_SHOWN = 12  # faults


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked checkpoint: every tensor is there, has its shape, and is finite.

    path: of its folder or GGUF file. tensors: the canonical ones of `decoder`. parameters:
    how many values are stored, those of a tied embedding once. files: all that were read.
    merged: adapters that are in the weights (`deltas`), by `Delta.path`, with their sha256.
    channels: by canonical name, what a matrix's inputs were divided by (`equalise`).
    """

    path: Path
    decoder: Decoder
    tensors: Mapping[str, Float32]
    parameters: int
    text: TextSide
    files: tuple[Path, ...]
    merged: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, Float32] = field(default_factory=dict)

    @property
    def codec(self) -> TextCodec:
        return self.text.codec

    @property
    def form(self) -> PromptForm:
        return self.text.codec.form

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokenizer's, in id order; ids above them are padding of the vocabulary."""
        return self.text.tokens

    @property
    def head(self) -> Float32:
        """The LM head, [vocabulary, width]; the embedding itself when tied."""
        return self.tensors["embedding" if self.decoder.tied else "head.weight"]

    def digests(self) -> dict[str, str]:
        """sha256 of every file that the conversion reads, and of adapters that were merged."""
        return {file.name: file_entry(file).sha256 for file in self.files} | dict(self.merged)

    @property
    def base(self) -> str:
        """The digest of the weights that adapters are made for."""
        return base_digest(self.digests())


def read_checkpoint(
    path: str | Path, prompt: str | None = None, context: int | None = None
) -> Checkpoint:
    """Reads and checks a checkpoint folder or a GGUF file.

    prompt: a form of `prompts.NAMES` for a model without command.json; by default its chat
    template is recognised. context: positions to keep of those that the model has, by
    default all. Raises CheckpointError (it names everything that is wrong with the tensors
    at once), DependencyMissing.
    """
    path = Path(path)
    if path.is_dir():
        source = _read_folder(path, prompt)
    elif path.suffix == ".gguf":
        source = _read_gguf(path, prompt)
    else:
        raise CheckpointError(f"{path} is not a checkpoint folder or a .gguf file")
    if len(source.tokens) > source.decoder.vocab_size:
        raise CheckpointError(
            f"{TOKENIZER} has {len(source.tokens)} tokens, the model {source.decoder.vocab_size}"
        )
    return source if context is None else _shortened(source, context)


def _read_folder(path: Path, prompt: str | None) -> Checkpoint:
    check_sums(path)
    config = read_json(path / CONFIG)
    architecture = architecture_of(config)
    decoder = checked(architecture.decoder(config), CONFIG)
    layout = architecture.layout(decoder, config)
    stored = _stored_tensors(path, architecture, layout)
    text = of_folder(path, prompt)
    files = dict.fromkeys((CONFIG, *text.files, *(file.name for file in weight_files(path))))
    return Checkpoint(
        path,
        decoder,
        canonical(layout, decoder, stored),
        sum(tensor.size for tensor in stored.values()),
        text,
        tuple(path / name for name in files),
    )


def _read_gguf(path: Path, prompt: str | None) -> Checkpoint:
    model = read_gguf(path)
    text = of_gguf(model.metadata.values, prompt)
    return Checkpoint(path, model.decoder, model.tensors, model.parameters, text, (path,))


def _shortened(source: Checkpoint, context: int) -> Checkpoint:
    """With a context of `context` positions: less memory for keys and values on the device."""
    if not 0 < context <= source.decoder.positions:
        raise CheckpointError(
            f"a context of {context} tokens is not within the model's {source.decoder.positions}"
        )
    tensors, removed = dict(source.tensors), 0
    if source.decoder.position == "learned":
        tensors["positions"] = source.tensors["positions"][:context]
        removed = source.tensors["positions"].size - tensors["positions"].size
    return replace(
        source,
        decoder=replace(source.decoder, positions=context),
        tensors=tensors,
        parameters=source.parameters - removed,
    )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, those that transformers takes: an index counts
    where there is no single file. Raises CheckpointError when there are none."""
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():
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


def read_tensors(file: Path, skipped: tuple[str, ...] = ()) -> Iterator[tuple[str, Float32]]:
    """Of a safetensors file. skipped: endings of names. Raises CheckpointError, DependencyMissing,
    OutOfMemory."""
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
    except MemoryError:
        raise OutOfMemory(f"{file} does not fit into the memory") from None
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
    tensors: dict[str, Float32] = {}
    for file in weight_files(path):
        for name, tensor in read_tensors(file, architecture.BUFFERS):
            tensors[name.removeprefix(architecture.PREFIX)] = tensor
    _drop_tied_head(tensors, layout)
    shapes = {
        name: shape
        for place in layout.values()
        for name, shape in zip(place.names, place.shapes, strict=True)
    }
    faults = [f"missing {name}" for name in shapes if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in shapes]
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            faults.append(f"{name} is {list(tensors[name].shape)}, config.json says {list(shape)}")
        elif name in tensors and not np.isfinite(tensors[name]).all():
            faults.append(f"{name} has values that are not finite")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(f"{path}: {'; '.join(faults[:_SHOWN])}{more}")
    return tensors


def _drop_tied_head(tensors: dict[str, Float32], layout: Layout) -> None:
    """Removes the second copy of a tied embedding; safetensors may have kept that one alone.
    Raises CheckpointError when they differ."""
    if "head.weight" in layout or (head := tensors.pop(HEAD, None)) is None:
        return
    (name,) = layout["embedding"].names
    if not np.array_equal(head, tensors.setdefault(name, head)):
        raise CheckpointError(
            f"{HEAD} differs from {name}, but config.json ties them",
            'set "tie_word_embeddings": false',
        )
