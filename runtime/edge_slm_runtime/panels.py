"""The storage format of matrices of the numba engine, for its writer and its kernels.

Outputs are taken 16 at a time, a panel; a panel's inputs in strips of 32. A strip holds, of
four inputs after four, the levels of the 16 outputs, input by input within an output: what
one vector instruction takes. With 4 bits the first four inputs are the lower halves of the
bytes and the next four the upper ones. So a decode step reads each panel from front to back.

The names of a matrix's tensors, in a file of Hugging Face's safetensors format:

    levels   uint8 [panels, blocks, bytes of a block]
    scale    float16 [panels, blocks, 16]
    zero     uint8 [panels, blocks, 16], of 4-bit levels; that of 8-bit ones is 128
    bias     float32 [16 · panels]
    channels float16 [inputs], what the inputs were divided by (`equalise`), where they were;
             adapters, whose factors know nothing of it, are multiplied with it

Outputs are filled up to whole UNITs, with scales of 0; so every tensor is a whole number of
vectors. The file's header is filled up with spaces, so that they lie on the boundary of one when
the file is mapped into memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.decoder import Decoder

LANES = 16  # outputs of a panel
STRIP = 32  # inputs that are multiplied without a look at the loop
PAIR = 2  # panels that tiles of several rows take together
UNIT = 64  # outputs come in multiples of it
ALIGNMENT = 64  # bytes

# The names of tensors in the files of bundles are those of GPT-2, whatever the architecture:
# they were there before there was another one.
_STORED = {
    "embedding": "wte",
    "positions": "wpe",
    "layers": "h",
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
    "final_norm": "ln_f",
    "head": "lm_head",
}

UInt8 = NDArray[np.uint8]


def stored_name(name: str) -> str:
    """The name in a bundle's files of a canonical tensor (see `decoder`)."""
    return ".".join(_STORED.get(part, part) for part in name.split("."))


def file_metadata(decoder: Decoder) -> dict[str, str]:
    """What a file's metadata says about the model. Traits and sizes that a GPT-2 of the same
    width has too are left out."""
    data = {
        "activation": decoder.activation,
        "layer_norm_epsilon": repr(decoder.norm_epsilon),
        **{
            name: str(getattr(decoder, name))
            for name in ("layers", "heads", "width", "vocab_size", "positions")
        },
    }
    usual = {
        "kv_heads": decoder.heads,
        "head_width": decoder.width // decoder.heads,
        "norm": "layer",
        "position": "learned",
        "rope_theta": 0.0,
        "rope_factors": (),
        "mlp": "plain",
    }
    for name, value in usual.items():
        if (found := getattr(decoder, name)) != value:
            data[name] = ",".join(map(repr, found)) if name == "rope_factors" else str(found)
    return data


def pack_levels(levels: UInt8, bits: int, size: int) -> UInt8:
    """[K,N] → [panels, blocks, bytes of a block]. K is a multiple of `size`, which is one
    of STRIP, and N one of UNIT."""
    inputs, outputs = levels.shape
    # [blocks, strips of a block, fours, four, panels, lanes]
    parts = levels.reshape(inputs // size, size // STRIP, STRIP // 4, 4, outputs // LANES, LANES)
    parts = parts.transpose(4, 0, 1, 2, 5, 3)
    if bits == 4:
        parts = parts[:, :, :, 0::2] | parts[:, :, :, 1::2] << np.uint8(4)
    return np.ascontiguousarray(parts).reshape(outputs // LANES, inputs // size, -1)


def alternating(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The outputs [..., 2 × inner] of a gated layer panel by panel: one of the gate, one of
    the other half, and so on; each half is filled up to whole panels first."""
    halves = values.reshape(*values.shape[:-1], 2, -1)
    halves = np.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, -halves.shape[-1] % LANES)])
    panels = halves.reshape(*halves.shape[:-1], -1, LANES).swapaxes(-3, -2)
    return np.ascontiguousarray(panels).reshape(*values.shape[:-1], -1)


def pack_outputs(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Scales or zero points [blocks, N] → [panels, blocks, 16]."""
    blocks, outputs = values.shape
    parts = values.reshape(blocks, outputs // LANES, LANES).transpose(1, 0, 2)
    return np.ascontiguousarray(parts)
