"""The weights of the numba engine in memory, and the table by which its kernels find them."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import EngineError, ManifestInvalid, shown
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.panels import ALIGNMENT, LANES, SHAPE, STRIP, UNIT

_HEADER_LIMIT = 16 << 20  # bytes
_MOST = 1 << 20  # of anything that a model has; what there really is, its tensors tell
_DTYPES: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "U8": np.uint8}
Tensor = NDArray[Any]


class Weights:
    """A file of Hugging Face's safetensors format, mapped into memory, and the table of it."""

    def __init__(self, path: Path, facts: Decoder) -> None:
        """Raises EngineError, ManifestInvalid."""
        try:
            self._header, self._data = _read(path)
            settings = self._header["__metadata__"]
            activation = t.ACTIVATIONS.index(settings["activation"])
            epsilon = _share(settings["layer_norm_epsilon"])
            found = [int(settings[name]) for name in SHAPE]
        except (OSError, ValueError, KeyError, TypeError, MemoryError, RecursionError) as error:
            raise EngineError(f"{path.parent.name} cannot be read: {error}") from None
        told = [getattr(facts, name) for name in SHAPE]
        if found != told or min(told) < 1 or max(told) > _MOST or facts.width % facts.heads:
            raise ManifestInvalid(
                f"{path.parent.name} has {', '.join(SHAPE)} {found}, the manifest says {told}"
            )
        self._tensors: list[Tensor] = []
        self.width, self.widest, self.inputs, self.blocks = facts.width, 0, 0, 0
        table = self.table = np.zeros(t.FIRST_LAYER + t.LAYER * facts.layers, np.int64)
        table[t.LAYERS], table[t.HEADS] = facts.layers, facts.heads
        table[t.HEAD_SIZE], table[t.WIDTH] = facts.width // facts.heads, facts.width
        table[t.POSITIONS], table[t.ACTIVATION] = facts.positions, activation
        table[t.EPSILON : t.EPSILON + 1].view(np.float32)[0] = epsilon
        table[t.POSITION_TABLE] = self._vector("wpe", facts.positions * facts.width)
        table[t.FINAL_WEIGHT] = self._vector("ln_f.weight", facts.width)
        table[t.FINAL_BIAS] = self._vector("ln_f.bias", facts.width)
        tied = "lm_head.levels" not in self._header
        head = "wte" if tied else "lm_head"
        self._matrix(t.EMBEDDING, "wte", facts.width, facts.vocab_size, bits=8)
        self._matrix(t.LM_HEAD, head, facts.width, facts.vocab_size)
        for i in range(facts.layers):
            start, layer = t.FIRST_LAYER + t.LAYER * i, f"h.{i}."
            for place, name in (
                (t.NORM_1, "ln_1.weight"),
                (t.NORM_1_BIAS, "ln_1.bias"),
                (t.NORM_2, "ln_2.weight"),
                (t.NORM_2_BIAS, "ln_2.bias"),
            ):
                table[start + place] = self._vector(layer + name, facts.width)
            width = facts.width
            self._matrix(start + t.C_ATTN, layer + "attn.c_attn", width, 3 * width)
            self._matrix(start + t.C_PROJ, layer + "attn.c_proj", width, width)
            inner = self._matrix(start + t.C_FC, layer + "mlp.c_fc", width, None)
            self._matrix(start + t.MLP_PROJ, layer + "mlp.c_proj", inner, width)

    def _matrix(
        self, place: int, name: str, inputs: int, outputs: int | None, bits: int | None = None
    ) -> int:
        """Enters a matrix into the table; returns its outputs, filled up to a UNIT."""
        levels = self._tensor(f"{name}.levels", "U8")
        panels, blocks, block_bytes = levels.shape
        found = 4 if f"{name}.zero" in self._header else 8
        size = block_bytes * 8 // (LANES * found)
        fits = (
            size * LANES * found == block_bytes * 8
            and size % STRIP == 0
            and size > 0
            # Inputs that are filled up may be less by some.
            and inputs - UNIT < blocks * size < inputs + size
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
        if f"{name}.bias" in self._header:
            row[t.BIAS] = self._tensor(f"{name}.bias", "F32", (panels * LANES,)).ctypes.data
        elif ".c_" in name:
            raise ManifestInvalid(f"{name} has no bias")
        row[t.BLOCKS], row[t.SIZE], row[t.BITS], row[t.PANELS] = blocks, size, found, panels
        if ".c_" in name:
            self.widest = max(self.widest, panels * LANES)
        self.inputs = max(self.inputs, blocks * size)
        self.blocks = max(self.blocks, blocks)
        return int(panels) * LANES

    def _vector(self, name: str, count: int) -> int:
        filled = -(-count // UNIT) * UNIT
        return int(self._tensor(name, "F32", (filled,)).ctypes.data)

    def _tensor(self, name: str, dtype: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """shape: what it must be; None is any of three dimensions."""
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
        self._tensors.append(tensor)
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
