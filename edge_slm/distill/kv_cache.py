"""Keys and values of a batch that is decoded: they grow in place, and are read once.

The DynamicLayer of transformers copies all of them for every token, half of the time of a
small model on a CPU. Its StaticLayer attends to the whole context at every step. Its attention
copies them once for every query head that shares a key head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

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


def _grouped(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query heads in groups, one for each key head.

    query [rows, heads, new, head width], key and value [rows, KV heads, all, head width],
    attention_mask bool [rows, 1, new, all] → [rows, new, heads, head width].
    """
    rows, heads, new, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(rows, groups, -1, width)  # a group's heads, then positions
    scores = grouped @ key.transpose(-1, -2) * (scaling or width**-0.5)
    scores = scores.float().view(rows, groups, -1, new, key.shape[2])
    hidden = ~attention_mask[:, :, None]
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1).to(query.dtype)
    mixed = weights.flatten(2, 3) @ value
    return mixed.view(rows, heads, new, width).transpose(1, 2), None


AttentionInterface.register(GROUPED := "edge_slm_grouped", _grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
