"""Weights of the numba engine in memory, and the table of their addresses for its kernels."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.decoder import ACTIVATIONS, Decoder
from edge_slm_runtime.engines.base import native_error
from edge_slm_runtime.errors import ManifestInvalid, shown
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.panels import ALIGNMENT, LANES, STRIP, UNIT, file_metadata, stored_name

_HEADER_LIMIT = 16 << 20  # bytes
_OF_THE_FILE = ("activation", "layer_norm_epsilon")  # older manifests do not have them
_DTYPES: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "U8": np.uint8}
Tensor = NDArray[Any]


class Weights:
    """A file of Hugging Face's safetensors format, mapped into memory, and the table of it.

    Sizes of the buffers that a token needs, in values: `widest` of a product, `gated` of a
    gated feed-forward layer, `attended` of a normalised row or of attention's output; `inputs`
    and `blocks` of quantised activations.
    """

    def __init__(self, path: Path, decoder: Decoder) -> None:
        """Raises EngineError, OutOfMemory, ManifestInvalid."""
        try:
            self._header, self._data = _read(path)
            settings = self._header["__metadata__"]
            activation = ACTIVATIONS.index(settings["activation"])
            epsilon = _share(settings["layer_norm_epsilon"])
        except (OSError, ValueError, KeyError, TypeError, MemoryError, RecursionError) as error:
            raise native_error(f"{path.parent.name} cannot be read", error) from None
        for name, value in file_metadata(decoder).items():
            if name not in _OF_THE_FILE and settings.get(name) != value:
                raise ManifestInvalid(
                    f"{path.parent.name} has {name} {shown(settings.get(name))}, "
                    f"the manifest says {value}"
                )
        self.decoder = decoder
        self.widest, self.inputs, self.blocks = 0, 0, 0
        self.attended = max(decoder.width, decoder.attention_width)
        self.table = np.zeros(t.FIRST_LAYER + t.LAYER * decoder.layers, np.int64)
        for place, number in (
            (t.LAYERS, decoder.layers),
            (t.HEADS, decoder.heads),
            (t.KV_HEADS, decoder.kv_heads),
            (t.HEAD_WIDTH, decoder.head_width),
            (t.WIDTH, decoder.width),
            (t.POSITIONS, -(-decoder.positions // LANES) * LANES),
            (t.ACTIVATION, activation),
        ):
            self.table[place] = number
        self.table[t.EPSILON : t.EPSILON + 1].view(np.float32)[0] = epsilon
        self._enter_positions()
        self._enter_norm("final_norm", t.FINAL_WEIGHT, t.FINAL_BIAS)
        head = "head" if f"{stored_name('head')}.levels" in self._header else "embedding"
        self._matrix(t.EMBEDDING, "embedding", decoder.width, decoder.vocab_size, bits=8)
        self._matrix(t.LM_HEAD, head, decoder.width, decoder.vocab_size)
        self.gated = 0
        for i in range(decoder.layers):
            self._enter_layer(i)

    def _enter_positions(self) -> None:
        decoder = self.decoder
        if decoder.position == "learned":
            count = decoder.positions * decoder.width
            self.table[t.POSITION_TABLE] = self._vector("positions", count)
            return
        self._rotary = np.concatenate(decoder.rotary_table(), axis=1)  # kept alive
        self.table[t.POSITION_TABLE] = self._rotary.ctypes.data

    def _enter_norm(self, name: str, weight: int, bias: int) -> None:
        self.table[weight] = self._vector(f"{name}.weight", self.decoder.width)
        if self.decoder.norm == "layer":
            self.table[bias] = self._vector(f"{name}.bias", self.decoder.width)

    def _enter_layer(self, i: int) -> None:
        start, layer, decoder = t.FIRST_LAYER + t.LAYER * i, f"layers.{i}", self.decoder
        self._enter_norm(f"{layer}.attention_norm", start + t.NORM_1, start + t.NORM_1_BIAS)
        self._enter_norm(f"{layer}.mlp_norm", start + t.NORM_2, start + t.NORM_2_BIAS)
        shapes = decoder.layer_matrices()
        self._matrix(start + t.LAYER_QKV, f"{layer}.qkv", *shapes["qkv"], bias=True)
        self._matrix(start + t.LAYER_OUT, f"{layer}.out", *shapes["out"], bias=True)
        inner = self._matrix(start + t.LAYER_UP, f"{layer}.up", decoder.width, None, bias=True)
        if decoder.mlp == "gated":
            inner //= 2
            self.gated = max(self.gated, inner)
        shape = inner, decoder.width
        self._matrix(start + t.LAYER_DOWN, f"{layer}.down", *shape, bias=True, filled=True)

    def _matrix(
        self,
        place: int,
        name: str,
        inputs: int,
        outputs: int | None,
        *,
        bits: int | None = None,
        bias: bool = False,
        filled: bool = False,
    ) -> int:
        """Enters a matrix into the table; returns its outputs, filled up to a UNIT.

        filled: `inputs` are filled up likewise, so the matrix may have fewer by some.
        """
        name = stored_name(name)
        levels = self._tensor(f"{name}.levels", "U8")
        panels, blocks, block_bytes = levels.shape
        found = 4 if f"{name}.zero" in self._header else 8
        size = block_bytes * 8 // (LANES * found)
        fits = (
            size * LANES * found == block_bytes * 8
            and size % STRIP == 0
            and size > 0
            and inputs - (UNIT - 1 if filled else 0) <= blocks * size < inputs + size
            and panels % (UNIT // LANES) == 0
            and (outputs is None or panels * LANES == -(-outputs // UNIT) * UNIT)
            and bits in (None, found)
        )
        if not fits:
            raise ManifestInvalid(f"{name} has levels of shape {list(levels.shape)}")
        lines = (panels, blocks, LANES)
        row = self.table[place : place + t.MATRIX]
        row[t.LEVEL] = levels.ctypes.data
        row[t.SCALE] = self._tensor(f"{name}.scale", "F16", lines).ctypes.data
        if found == 4:
            row[t.ZERO] = self._tensor(f"{name}.zero", "U8", lines).ctypes.data
        if bias:
            row[t.BIAS] = self._tensor(f"{name}.bias", "F32", (panels * LANES,)).ctypes.data
            self.widest = max(self.widest, panels * LANES)
        row[t.BLOCKS], row[t.SIZE], row[t.BITS], row[t.PANELS] = blocks, size, found, panels
        self.inputs = max(self.inputs, blocks * size)
        self.blocks = max(self.blocks, blocks)
        return int(panels) * LANES

    def channels(self, matrix: str) -> NDArray[np.float32] | None:
        """What the inputs of a matrix were divided by, where they were."""
        name, inputs = f"{stored_name(matrix)}.channels", self.decoder.matrices()[matrix][0]
        if name not in self._header:
            return None
        stored = self._tensor(name, "F16", (-(-inputs // UNIT) * UNIT,))
        found: NDArray[np.float32] = stored[:inputs].astype(np.float32)
        return found

    def _vector(self, name: str, count: int) -> int:
        filled = -(-count // UNIT) * UNIT
        return int(self._tensor(stored_name(name), "F32", (filled,)).ctypes.data)

    def _tensor(self, name: str, dtype: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """shape: the required one; None accepts any with three dimensions."""
        entry: Any = self._header.get(name)
        try:
            start, end = entry["data_offsets"]
            found = tuple(entry["shape"])
            right = (
                entry["dtype"] == dtype
                and (found == shape if shape else len(found) == 3 and min(found) > 0)
                and start % ALIGNMENT == 0
                and 0 <= start <= end <= len(self._data)
            )
            tensor: Tensor = self._data[start:end].view(_DTYPES[dtype]).reshape(found)
        except (KeyError, TypeError, ValueError):
            right = False
        if not right:
            raise ManifestInvalid(f"the tensor {name} is {shown(entry)}")
        return tensor


def _read(path: Path) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Header and data. Raises ValueError, OSError, MemoryError."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(content[:8], "little")
    if length > min(_HEADER_LIMIT, len(content) - 8):
        raise ValueError(f"a header of {length} bytes")
    if (8 + length) % ALIGNMENT:
        raise ValueError(f"its data do not begin at a multiple of {ALIGNMENT} bytes")
    return json.loads(content[8 : 8 + length]), np.frombuffer(content, np.uint8)[8 + length :]


def _share(value: Any) -> float:
    number = float(value)
    if not 0 <= number < 1:
        raise ValueError(f"layer_norm_epsilon is {number}")
    return number
