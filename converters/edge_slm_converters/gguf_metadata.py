"""Keys and values of a GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_slm_runtime.decoder import LARGEST
from edge_slm_runtime.errors import CheckpointError, shown

# What an architecture writes about a Decoder: keys without its name.
Settings = dict[str, int | float | str]
# Canonical name of a layer's matrix → its parts in a file: rows, one below the other.
Parts = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Metadata:
    """Keys and values of a GGUF file. Raises CheckpointError, naming the key."""

    values: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above zero. key: without the name of the architecture."""
        return int(self._positive(key, int, default, LARGEST))

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero."""
        return self._positive(key, int | float, default)

    def of_model(self, key: str) -> Any:
        """The value of a key of the architecture; None where it is missing."""
        return self.values.get(f"{self.architecture}.{key}")

    def _positive(
        self, key: str, kind: Any, default: float | None, most: float = sys.float_info.max
    ) -> float:
        value = self.of_model(key)
        value = default if value is None else value
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= most:
            allowed = f"a positive number up to {most:.7g}"
            raise CheckpointError(
                f"GGUF: {self.architecture}.{key} must be {allowed}, got {shown(value)}"
            )
        return float(value)
