"""Keys and values of a batch that is decoded; they grow in place.

The DynamicLayer of transformers copies all of them for every token, half of the time of a
small model on a CPU. Its StaticLayer attends to the whole context at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

_GROWTH = 64  # columns


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    _both: torch.Tensor | None = None  # [2, rows, KV heads, capacity, head width]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [rows, KV heads, new, head width]; returns all keys and all values."""
        rows, heads, new, width = key_states.shape
        old, self.is_initialized = self.get_seq_length(), True
        if self._both is None or self._both.shape[3] < old + new:
            both = key_states.new_empty((2, rows, heads, old + new + _GROWTH, width))
            if self._both is not None:
                both[:, :, :, :old] = self._both[:, :, :, :old]
            self._both = both
        self._both[0, :, :, old : old + new] = key_states
        self._both[1, :, :, old : old + new] = value_states
        self.keys, self.values = self._both[:, :, :, : old + new]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Drops all other rows."""
        assert self._both is not None
        seen = self.get_seq_length()
        self._both = self._both[:, indices]
        self.keys, self.values = self._both[:, :, :, :seen]


def growing_cache() -> Cache:
    """An empty cache for one batch."""
    return Cache(layer_class_to_replicate=_Layer)
