"""Writes a GGUF file: the same weights for llama.cpp, whose GPT-2 graph is the peer's.

What is stored how follows llama.cpp's own tools (`convert_hf_to_gguf.py`,
`llama-quantize`): matrices in the type asked for; positions, norms and biases in F32; a
tied embedding once, because the loader takes it as the head when `output.weight` is
missing. One difference: under Q4_0 `llama-quantize` keeps the head in Q6_K where the
width is a multiple of 256, and in Q8_0 elsewhere; the `gguf` package cannot make
K-quants, so ours is always Q8_0 (8.5 bits a weight instead of 6.6).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge_slm_converters.arrays import Float32
from edge_slm_converters.checkpoint import Checkpoint, read_json
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
# llama.cpp knows pre-tokenizers by name only; this is the one of GPT-2's byte-level BPE.
PRE_TOKENIZER = "gpt-2"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LAYER_TENSORS = {
    "attention_norm": "attn_norm",
    "qkv": "attn_qkv",
    "out": "attn_output",
    "mlp_norm": "ffn_norm",
    "up": "ffn_up",
    "down": "ffn_down",
}


def write_gguf(checkpoint: Checkpoint, file: Path, quantisation: Quantisation) -> int:
    """Writes `file`; returns the bytes of matrices that one decoding step reads.

    quantisation: a key of `BLOCKS`. Raises CheckpointError for what llama.cpp's GPT-2
    does not compute, for a tokenizer that it would not split text like, and for rows
    that are not whole blocks; TargetExists, DependencyMissing.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise DependencyMissing(
            "writing a GGUF file needs gguf", "pip install 'edge-slm[peers]'"
        ) from None
    _check_computation(checkpoint.decoder)
    stored = list(_stored(checkpoint, quantisation))
    merges = _merges(checkpoint)
    with write_aside(file, replace=False) as aside:
        writer = GGUFWriter(aside, "gpt2")
        _add_shape(writer, checkpoint, quantisation)
        _add_tokenizer(writer, checkpoint, merges)
        _add_tensors(writer, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return step_bytes(checkpoint.decoder, quantisation)


def head_type(quantisation: Quantisation) -> Quantisation:
    """The type of the LM head, and of a tied embedding."""
    return "Q8_0" if quantisation == "Q4_0" else quantisation


def plain_attention(decoder: Decoder) -> bool:
    """Whether every layer divides by √(head width), as GPT-2 itself does."""
    return set(decoder.attention_scale) == {decoder.head_width**-0.5}


def step_bytes(decoder: Decoder, quantisation: Quantisation) -> int:
    """Bytes of matrices that one decoding step reads, by formula."""
    layers = sum(_bytes(k * n, quantisation) for k, n in decoder.matrices().values())
    return layers + _bytes(decoder.width * decoder.vocab_size, head_type(quantisation))


def _bytes(values: int, kind: str) -> int:
    size, length = BLOCKS[kind]
    return values // size * length


def _check_computation(decoder: Decoder) -> None:
    if decoder.activation != "gelu_tanh":
        raise CheckpointError(
            f"llama.cpp's GPT-2 has no {decoder.activation}", "it computes gelu_tanh alone"
        )
    if not plain_attention(decoder):
        raise CheckpointError("llama.cpp's GPT-2 scales attention by head width alone")


def _stored(
    checkpoint: Checkpoint, quantisation: Quantisation
) -> Iterator[tuple[str, Float32, str]]:
    """(llama.cpp's name, tensor [out, in] or [n], type) of everything that is stored.

    Raises CheckpointError, naming the tensor, for rows that are not whole blocks.
    """
    decoder, tensors = checkpoint.decoder, checkpoint.tensors
    head = head_type(quantisation)
    named: list[tuple[str, str, Quantisation]] = [
        ("embedding", "token_embd.weight", head if decoder.tied else quantisation),
        ("positions", "position_embd.weight", "F32"),
        ("final_norm.weight", "output_norm.weight", "F32"),
        ("final_norm.bias", "output_norm.bias", "F32"),
    ]
    if not decoder.tied:
        named.append(("head.weight", "output.weight", head))
    for i in range(decoder.layers):
        for ours, theirs in LAYER_TENSORS.items():
            matrix: Quantisation = "F32" if "norm" in theirs else quantisation
            named.append((f"layers.{i}.{ours}.weight", f"blk.{i}.{theirs}.weight", matrix))
            named.append((f"layers.{i}.{ours}.bias", f"blk.{i}.{theirs}.bias", "F32"))
    for ours, theirs, kind in named:
        tensor = tensors[ours]
        if ours.startswith("layers."):  # [in, out]; a vector is the same either way
            tensor = tensor.T
        if tensor.shape[-1] % BLOCKS[kind][0]:
            raise CheckpointError(
                f"{ours} cannot be stored as {kind}: rows of {tensor.shape[-1]} values "
                f"are not whole blocks of {BLOCKS[kind][0]}"
            )
        yield theirs, tensor, kind


def _add_shape(writer: GGUFWriter, checkpoint: Checkpoint, quantisation: Quantisation) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    decoder = checkpoint.decoder
    writer.add_name(checkpoint.path.resolve().name)
    writer.add_context_length(decoder.positions)
    writer.add_embedding_length(decoder.width)
    writer.add_block_count(decoder.layers)
    writer.add_feed_forward_length(decoder.inner)
    writer.add_head_count(decoder.heads)
    writer.add_layer_norm_eps(decoder.norm_epsilon)
    writer.add_vocab_size(decoder.vocab_size)
    kind = "ALL_F32" if quantisation == "F32" else f"MOSTLY_{quantisation}"
    writer.add_file_type(LlamaFileType[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint, merges: list[str]) -> None:
    """Control tokens are typed so: llama.cpp finds them in text only when it is told to
    parse special tokens, and never prints them."""
    from gguf import TokenType

    codec, size = checkpoint.codec, len(checkpoint.tokens)
    padding = range(size, checkpoint.decoder.vocab_size)
    kinds = ["CONTROL" if i in codec.controls else "NORMAL" for i in range(size)]
    kinds += ["UNUSED"] * len(padding)
    end = codec.ends[0]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list([*checkpoint.tokens, *(f"<|padding:{i}|>" for i in padding)])
    writer.add_token_types([TokenType[kind] for kind in kinds])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)  # the grammar of a prompt is the command schema's
    writer.add_add_space_prefix(False)


def _merges(checkpoint: Checkpoint) -> list[str]:
    """The merges of the tokenizer, best first, each "left right".

    Raises CheckpointError when llama.cpp has no name for how it splits text.
    """
    data = read_json(checkpoint.path / "tokenizer.json")
    split = {"use_regex": True, **(data.get("pre_tokenizer") or {})}
    if any(split.get(key) != value for key, value in BYTE_LEVEL.items()):
        raise CheckpointError(
            f"tokenizer.json: llama.cpp has no name for pre_tokenizer {split.get('type')!r}",
            "only a ByteLevel one with GPT-2's regex and without prefix space can be declared",
        )
    merges = data["model"].get("merges", [])
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _add_tensors(writer: GGUFWriter, stored: list[tuple[str, Float32, str]]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    for name, tensor, kind in stored:
        qtype = GGMLQuantizationType[kind]
        data: Any = quantize(np.ascontiguousarray(tensor), qtype)
        writer.add_tensor(name, data, raw_dtype=qtype)
