"""Canonical tensors and those of a GGUF file, in both directions.

A GGUF file keeps linear weights outputs first, and queries, keys, values, gate and up as matrices
of their own in most architectures. In some of them rows of queries and keys are in llama.cpp's
order: rotary pairs lie side by side in a head (2i, 2i + 1), where the canonical order has its
halves (i, i + head_width / 2).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from edge_slm_converters.arrays import Float32
from edge_slm_converters.gguf_metadata import Parts
from edge_slm_runtime.decoder import Decoder

ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies
_NORMS = {"attention_norm": ("attn_norm",), "mlp_norm": ("ffn_norm",)}
_WHOLE = {
    "embedding": "token_embd.weight",
    "positions": "position_embd.weight",
    "final_norm.weight": "output_norm.weight",
    "final_norm.bias": "output_norm.bias",
    "head.weight": "output.weight",
}


def stored_names(decoder: Decoder, parts: Parts) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(canonical name, names of its parts in the file) of every tensor of the decoder."""
    for name in decoder.shapes():
        if name in _WHOLE:
            yield name, (_WHOLE[name],)
        else:
            _, layer, matrix, kind = name.split(".")
            stored = _NORMS.get(matrix) or parts[matrix]
            yield name, tuple(f"blk.{layer}.{part}.{kind}" for part in stored)


def joined(
    decoder: Decoder, stored: Mapping[str, Float32], interleaved: Collection[str]
) -> Float32:
    """A canonical tensor from its parts, by their names in the file, in order.

    interleaved: names of an architecture's parts whose rows are in llama.cpp's order.
    """
    rows = [
        _halved(part, decoder) if _part(name) in interleaved else part
        for name, part in stored.items()
    ]
    tensor = rows[0] if len(rows) == 1 else np.concatenate(rows)
    name = next(iter(stored))
    return np.ascontiguousarray(tensor.T if _is_linear(name) else tensor)


def split(
    decoder: Decoder, tensor: Float32, names: tuple[str, ...], interleaved: Collection[str]
) -> dict[str, Float32]:
    """The parts of a canonical tensor, by their `names` in the file: the inverse of `joined`."""
    rows = tensor.T if _is_linear(names[0]) else tensor
    key_rows = decoder.attention_width + decoder.kv_width
    ends = {1: [], 2: [decoder.inner], 3: [decoder.attention_width, key_rows]}[len(names)]
    parts = dict(zip(names, np.split(rows, ends), strict=True))
    return {
        name: _interleaved(part, decoder) if _part(name) in interleaved else part
        for name, part in parts.items()
    }


def _is_linear(name: str) -> bool:
    return name.startswith("blk.") and name.endswith(".weight") and "norm" not in name


def _part(name: str) -> str:
    """`attn_q` of `blk.0.attn_q.weight`."""
    return name.split(".")[-2]


def _interleaved(rows: Float32, decoder: Decoder) -> Float32:
    return _pairs_swapped(rows, (-1, 2, decoder.head_width // 2))


def _halved(rows: Float32, decoder: Decoder) -> Float32:
    return _pairs_swapped(rows, (-1, decoder.head_width // 2, 2))


def _pairs_swapped(rows: Float32, shape: tuple[int, int, int]) -> Float32:
    heads = rows.reshape(*shape, *rows.shape[1:]).swapaxes(1, 2)
    return np.asarray(heads.reshape(rows.shape), np.float32)
