"""Writes a GGUF file: the same weights for llama.cpp.

Types of tensors follow llama.cpp's own tools (`convert_hf_to_gguf.py`,
`llama-quantize`): matrices in the type asked for; positions, norms and biases in F32; a
tied embedding once, because the loader takes it as the head when `output.weight` is
missing. One difference: under Q4_0 `llama-quantize` keeps the head in Q6_K where the
width is a multiple of 256, and in Q8_0 elsewhere; the `gguf` package cannot make
K-quants, so ours is always Q8_0 (8.5 bits a weight instead of 6.6).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edge_slm_converters.architectures import GGUF_ARCHITECTURES
from edge_slm_converters.architectures.base import Architecture
from edge_slm_converters.arrays import Float32
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.gguf_metadata import Settings
from edge_slm_converters.gguf_tensors import ROPE_FACTORS, split, stored_names
from edge_slm_converters.gguf_tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer_name,
)
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError, DependencyMissing
from edge_slm_runtime.files import write_aside

if TYPE_CHECKING:
    from gguf import GGUFWriter

Quantisation = Literal["F32", "F16", "Q8_0", "Q4_0"]
# (values of a block, bytes of a block). A block lies along a row, which is one output.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
}


def write_gguf(checkpoint: Checkpoint, file: Path, quantisation: Quantisation) -> int:
    """Writes `file`; returns the bytes of matrices that one decoding step reads.

    quantisation: a key of `BLOCKS`. Raises CheckpointError for what llama.cpp does not
    compute, for a tokenizer that splits text in a way unknown to it, and for rows that are
    not whole blocks; TargetExists, DependencyMissing.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise DependencyMissing(
            "writing a GGUF file needs gguf", "pip install 'edge-slm[convert]'"
        ) from None
    decoder = checkpoint.decoder
    architecture = GGUF_ARCHITECTURES[decoder.architecture]
    settings = architecture.gguf_settings(decoder)
    stored = list(_stored(checkpoint, architecture, quantisation))
    tokenizer = json.loads(checkpoint.text.tokenizer)
    splitting = pre_tokenizer_name(tokenizer)
    with write_aside(file, replace=False) as aside:
        writer = GGUFWriter(aside, decoder.architecture)
        _add_settings(writer, checkpoint, settings, quantisation)
        _add_tokenizer(writer, checkpoint, tokenizer, splitting)
        _add_tensors(writer, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return step_bytes(decoder, quantisation)


def head_type(quantisation: Quantisation) -> Quantisation:
    """The type of the LM head, and of a tied embedding."""
    return "Q8_0" if quantisation == "Q4_0" else quantisation


def step_bytes(decoder: Decoder, quantisation: Quantisation) -> int:
    """Bytes of matrices that one decoding step reads, by formula."""
    layers = sum(_bytes(k * n, quantisation) for k, n in decoder.matrices().values())
    return layers + _bytes(decoder.width * decoder.vocab_size, head_type(quantisation))


def _bytes(values: int, kind: str) -> int:
    size, length = BLOCKS[kind]
    return values // size * length


def _stored(
    checkpoint: Checkpoint, architecture: Architecture, quantisation: Quantisation
) -> Iterator[tuple[str, Float32, str]]:
    """(llama.cpp's name, tensor [out, in] or [n], type) of everything that is stored.

    Raises CheckpointError, naming the tensor, for rows that are not whole blocks.
    """
    decoder = checkpoint.decoder
    kinds = {"embedding": head_type(quantisation) if decoder.tied else quantisation}
    kinds["head.weight"] = head_type(quantisation)
    if len(set(decoder.rope_factors)) > 1:
        yield ROPE_FACTORS, np.array(decoder.rope_factors, np.float32), "F32"
    for name, names in stored_names(decoder, architecture.GGUF_PARTS):
        tensor = checkpoint.tensors[name]
        if name.endswith(".bias") and not (architecture.GGUF_NEEDS_BIASES or tensor.any()):
            continue
        matrix = tensor.ndim == 2 and name != "positions"
        kind = kinds.get(name, quantisation) if matrix else "F32"
        for part, rows in split(decoder, tensor, names, architecture.GGUF_INTERLEAVED).items():
            if rows.shape[-1] % BLOCKS[kind][0]:
                raise CheckpointError(
                    f"{name} cannot be stored as {kind}: rows of {rows.shape[-1]} values "
                    f"are not whole blocks of {BLOCKS[kind][0]}"
                )
            yield part, rows, kind


def _add_settings(
    writer: GGUFWriter, checkpoint: Checkpoint, settings: Settings, quantisation: Quantisation
) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    writer.add_name(checkpoint.path.resolve().stem)
    for key, value in settings.items():
        add[type(value)](f"{checkpoint.decoder.architecture}.{key}", value)
    kind = "ALL_F32" if quantisation == "F32" else f"MOSTLY_{quantisation}"
    writer.add_file_type(LlamaFileType[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_tokenizer(
    writer: GGUFWriter, checkpoint: Checkpoint, tokenizer: dict[str, Any], splitting: str
) -> None:
    """Control tokens are typed as such: llama.cpp finds them in text only when asked to
    parse special tokens, and never prints them."""
    codec, size = checkpoint.codec, len(checkpoint.tokens)
    padding = range(size, checkpoint.decoder.vocab_size)
    kinds = [CONTROL if i in codec.controls else NORMAL for i in range(size)]
    for token in tokenizer["added_tokens"]:
        if token["id"] not in codec.controls:
            kinds[token["id"]] = USER_DEFINED
    merges = tokenizer["model"].get("merges", [])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list([*checkpoint.tokens, *(f"<|padding:{i}|>" for i in padding)])
    writer.add_token_types([*kinds, *([UNUSED] * len(padding))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(codec.ends[0])
    writer.add_eos_token_id(codec.ends[0])
    writer.add_add_bos_token(False)  # the form of a prompt says how it begins
    writer.add_add_space_prefix(False)


def _add_tensors(writer: GGUFWriter, stored: list[tuple[str, Float32, str]]) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    for name, tensor, kind in stored:
        qtype = GGMLQuantizationType[kind]
        data: Any = quantize(np.ascontiguousarray(tensor), qtype)
        writer.add_tensor(name, data, raw_dtype=qtype)
