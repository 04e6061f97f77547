"""Adapters: low-rank changes of a model's matrices, for a task (Hu et al., LoRA, arXiv 2106.09685).

A file of Hugging Face's safetensors format. Of each changed matrix, under its canonical name
(`decoder`), factors of its change a·b, with every scale in them:

    layers.{i}.qkv.a  float16 [inputs, rank]      layers.{i}.qkv.b  float16 [rank, outputs]

Metadata: `name`; `task`, whose requests it answers unless they say otherwise, empty for none;
`base`, the digest of the weights that it changes (`base_digest`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import AdapterInvalid, shown
from edge_slm_runtime.files import reading
from edge_slm_runtime.prompt import PromptForm

FOLDER = "deltas/"  # of a bundle
_SUFFIX = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")  # it becomes that of a file
_LARGEST = 1 << 30  # bytes of a file
_DTYPE = "<f2"


class Factors(NamedTuple):
    """a float16 [inputs, rank], b float16 [rank, outputs]."""

    a: NDArray[np.float16]
    b: NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class Delta:
    """factors: by canonical name of a matrix, without `.weight`."""

    name: str
    task: str
    base: str
    factors: Mapping[str, Factors]

    def __post_init__(self) -> None:
        """Raises AdapterInvalid for what no file may hold."""
        if not _NAME.fullmatch(self.name):
            raise AdapterInvalid(
                f"an adapter is named {shown(self.name)}", f"allowed: {_NAME.pattern}"
            )
        for matrix, (a, b) in self.factors.items():
            if a.ndim != 2 or b.ndim != 2 or not a.shape[1] == len(b) > 0:
                raise AdapterInvalid(f"{matrix} has factors of {a.shape} and {b.shape}")
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise AdapterInvalid(f"{matrix} has values that are not finite")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Delta:
        """Raises AdapterInvalid, BundleError when the file cannot be read."""
        path = Path(path)
        with reading(path):
            if not path.is_file():  # nor a pipe or a device, which may never end
                raise AdapterInvalid(f"{path} is not an adapter's file")
            if path.stat().st_size > _LARGEST:
                raise AdapterInvalid(f"{path} is larger than {_LARGEST >> 20} MiB")
            content = path.read_bytes()
        try:
            return cls._parsed(content)
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise AdapterInvalid(f"{path} is not an adapter: {error!r}") from None

    @classmethod
    def _parsed(cls, content: bytes) -> Delta:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        about = header.pop("__metadata__")
        tensors = {}
        for key, entry in header.items():
            first, last = entry["data_offsets"]
            if entry["dtype"] != "F16" or not 0 <= first <= last <= len(content) - end:
                raise ValueError(f"{key} is {shown(entry)}")
            values = np.frombuffer(content[end + first : end + last], _DTYPE)
            tensors[key] = values.reshape(entry["shape"])
        matrices = [key[:-2] for key in tensors if key.endswith(".a")]
        factors = {m: Factors(tensors.pop(f"{m}.a"), tensors.pop(f"{m}.b")) for m in matrices}
        if tensors or not factors:
            raise ValueError(f"it has {shown(sorted(tensors))} beside the factors of a matrix")
        name, task, base = (about[key] for key in ("name", "task", "base"))
        if not all(isinstance(text, str) for text in (name, task, base)):
            raise TypeError("name, task and base must be texts")
        return cls(name, task, base, factors)

    def to_bytes(self) -> bytes:
        """The contents of its file; the same adapter gives the same bytes."""
        header: dict[str, Any] = {
            "__metadata__": {"base": self.base, "name": self.name, "task": self.task}
        }
        parts, start = [], 0
        for matrix, factors in sorted(self.factors.items()):
            for letter, values in zip("ab", factors, strict=True):
                parts.append(np.ascontiguousarray(values, _DTYPE).tobytes())
                header[f"{matrix}.{letter}"] = {
                    "dtype": "F16",
                    "shape": list(values.shape),
                    "data_offsets": [start, start := start + len(parts[-1])],
                }
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        return b"".join((len(head).to_bytes(8, "little"), head, *parts))

    @property
    def path(self) -> str:
        """Of its file in a bundle."""
        return f"{FOLDER}{self.name}{_SUFFIX}"

    @cached_property
    def digest(self) -> str:
        """sha256 of its file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def rank(self) -> int:
        """The largest of a matrix."""
        return max(len(b) for _, b in self.factors.values())

    def of(self, matrix: str) -> NDArray[np.float32]:
        """The change [inputs, outputs] of a matrix that it has factors of."""
        a, b = self.factors[matrix]
        change: NDArray[np.float32] = a.astype(np.float32) @ b.astype(np.float32)
        return change

    def check(self, decoder: Decoder, form: PromptForm, base: str) -> None:
        """Raises AdapterInvalid unless it changes matrices of this model, whose weights have the
        digest `base`, for one of its tasks or none."""
        shapes = decoder.matrices()
        for matrix, (a, b) in self.factors.items():
            if (len(a), b.shape[1]) != shapes.get(matrix):
                raise AdapterInvalid(
                    f"adapter {self.name} changes {shown(matrix)} {[len(a), b.shape[1]]}, "
                    f"which the model has not"
                )
        if self.base != base:
            raise AdapterInvalid(
                f"adapter {self.name} was made for other weights ({self.base[:12]}…, "
                f"here {base[:12]}…)",
                "take the one of this model",
            )
        tasks = form.schema.tasks if form.schema else ()
        if self.task and self.task not in tasks:
            raise AdapterInvalid(
                f"adapter {self.name} is for task {shown(self.task)}",
                f"tasks of the model: {', '.join(tasks) or 'none'}",
            )


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A delta that a model was loaded with. memory: its factors as the engine reads them, None of
    an engine that reads none."""

    name: str
    task: str
    digest: str
    memory: Any


def base_digest(digests: Mapping[str, str]) -> str:
    """Of weights, by the sha256 of a checkpoint's files (`provenance.checkpoint` of a manifest):
    that of the file that holds them, of several the sha256 of these, in the order of names."""
    sums = [digests[name] for name in sorted(digests) if name.endswith((_SUFFIX, ".gguf"))]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
