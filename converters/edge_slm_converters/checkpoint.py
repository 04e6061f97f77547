"""Reads a GPT-2 checkpoint in the Hugging Face layout, without torch.

A checkpoint is a folder: `config.json`, the weights as `model.safetensors` (or
shards named by `model.safetensors.index.json`), `tokenizer.json` and
`command.json`. Weights come out as float32 numpy arrays whatever they were
stored as. Pickled weights are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm_runtime.bundle import file_entry
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import CheckpointError, DependencyMissing, ManifestInvalid
from edge_slm_runtime.prompt import PromptForm
from edge_slm_runtime.text import TextCodec

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

# What Hugging Face calls the functions that both engines have. The three
# spellings of the tanh approximation are the same formula.
ACTIVATIONS: Mapping[str, str] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
# Settings that would change the computation; their only value we can convert.
REFUSED_UNLESS: Mapping[str, Any] = {
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}
# Buffers of old checkpoints: the causal mask, not weights.
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """The shape of a GPT-2. `inner` is the width of the feed-forward layer,
    `activation` a value of `ACTIVATIONS`, `attention_scale[i]` what multiplies
    layer i's query·key products."""

    layers: int
    heads: int
    width: int
    inner: int
    vocab_size: int
    positions: int
    activation: str
    layer_norm_epsilon: float
    tied: bool
    attention_scale: tuple[float, ...]

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name (without `transformer.`) → shape. Linear weights are [in, out],
        as GPT-2's Conv1D keeps them; `lm_head.weight` is [vocabulary, width]."""
        d, inner = self.width, self.inner
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, d),
            "wpe.weight": (self.positions, d),
        }
        for i in range(self.layers):
            for name, shape in {
                "ln_1.weight": (d,),
                "ln_1.bias": (d,),
                "attn.c_attn.weight": (d, 3 * d),
                "attn.c_attn.bias": (3 * d,),
                "attn.c_proj.weight": (d, d),
                "attn.c_proj.bias": (d,),
                "ln_2.weight": (d,),
                "ln_2.bias": (d,),
                "mlp.c_fc.weight": (d, inner),
                "mlp.c_fc.bias": (inner,),
                "mlp.c_proj.weight": (inner, d),
                "mlp.c_proj.bias": (d,),
            }.items():
                shapes[f"h.{i}.{name}"] = shape
        shapes["ln_f.weight"] = shapes["ln_f.bias"] = (d,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Name (without `.weight`) → (inputs, outputs) of the matrices of all layers."""
        return {
            name.removesuffix(".weight"): shape
            for name, shape in self.shapes().items()
            if ".c_" in name and name.endswith(".weight")
        }

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes().values())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked checkpoint: every tensor is there, has its shape, and is finite.

    tokens: the tokenizer's, in id order; ids above them are padding of the vocabulary.
    """

    path: Path
    config: GPT2Config
    tensors: Mapping[str, Float32]
    schema: CommandSchema
    codec: TextCodec
    tokens: tuple[str, ...]

    @property
    def head(self) -> Float32:
        """The LM head, [vocabulary, width]; the embedding itself when tied."""
        return self.tensors["wte.weight" if self.config.tied else "lm_head.weight"]

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
    config = parse_config(read_json(path / "config.json"))
    tensors = _checked_tensors(path, config)
    return Checkpoint(path, config, tensors, *_read_text_side(path, config))


def parse_config(data: Mapping[str, Any]) -> GPT2Config:
    """Raises CheckpointError naming what cannot be converted."""
    if (model_type := data.get("model_type")) != "gpt2":
        raise CheckpointError(
            f"config.json: model_type {model_type!r} cannot be converted",
            "only gpt2 checkpoints can",
        )
    for key, only in REFUSED_UNLESS.items():
        if (value := data.get(key, only)) not in (only, None):
            raise CheckpointError(f"config.json: {key} = {value!r} cannot be converted")
    activation = data.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: activation_function {activation!r} cannot be converted",
            f"known: {', '.join(ACTIVATIONS)}",
        )
    layers, heads = _positive(data, "n_layer"), _positive(data, "n_head")
    width = _positive(data, "n_embd")
    if width % heads:
        raise CheckpointError(f"config.json: n_embd {width} is not a multiple of n_head {heads}")
    scale = (width // heads) ** -0.5 if data.get("scale_attn_weights", True) else 1.0
    by_layer = data.get("scale_attn_by_inverse_layer_idx", False)
    # reorder_and_upcast_attn only guards half precision against overflow: all our
    # attention runs in float32, so it needs nothing.
    return GPT2Config(
        layers=layers,
        heads=heads,
        width=width,
        inner=_positive(data, "n_inner", default=4 * width),
        vocab_size=_positive(data, "vocab_size"),
        positions=_positive(data, "n_positions"),
        activation=ACTIVATIONS[activation],
        layer_norm_epsilon=_positive(data, "layer_norm_epsilon", kind=float, default=1e-5),
        tied=bool(data.get("tie_word_embeddings", True)),
        attention_scale=tuple(scale / (i + 1 if by_layer else 1) for i in range(layers)),
    )


def _positive(
    data: Mapping[str, Any], key: str, *, kind: Any = int, default: float | None = None
) -> Any:
    """A number above zero; null means the default."""
    value = default if data.get(key) is None else data[key]
    if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"config.json: {key} must be a positive number, got {value!r}")
    return value


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


def _stored_tensors(file: Path) -> Iterator[tuple[str, Float32]]:
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
        if name.endswith(MASK_BUFFERS):
            continue
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


def _checked_tensors(path: Path, config: GPT2Config) -> dict[str, Float32]:
    found: dict[str, Float32] = {}
    for file in weight_files(path):
        for name, tensor in _stored_tensors(file):
            found[name.removeprefix("transformer.")] = tensor
    if config.tied and (head := found.pop("lm_head.weight", None)) is not None:
        embedding = found.get("wte.weight")
        if embedding is not None and not np.array_equal(head, embedding):
            raise CheckpointError(
                "lm_head.weight differs from wte.weight, but config.json ties them",
                'set "tie_word_embeddings": false',
            )
    shapes = config.shapes()
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


def read_schema(path: Path) -> CommandSchema:
    """The command schema of the checkpoint folder `path`. Raises CheckpointError."""
    try:
        return CommandSchema.from_json(read_json(path / "command.json"))
    except ManifestInvalid as error:
        raise CheckpointError(f"{path / 'command.json'}: {error.problem}") from None


def _read_text_side(
    path: Path, config: GPT2Config
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
    if len(tokens) > config.vocab_size:
        raise CheckpointError(
            f"tokenizer.json has {len(tokens)} tokens, the model {config.vocab_size}"
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
