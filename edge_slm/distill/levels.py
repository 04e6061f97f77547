"""Relevance levels: where the levels of each task lie in the reward, per band of length.

Quantiles within a band of length, because rewards depend on the length: without bands, a level
would partly be a length.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm.distill.samples import Sample
from edge_slm_runtime.command import RELEVANCE_LEVELS


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of one task.

    words: the bands begin at 0 and at each of these lengths. rewards: per band the inner
    quantiles; level k begins at edge k - 1.
    """

    words: tuple[int, ...]
    rewards: tuple[tuple[float, ...], ...]

    def of(self, reward: float, words: int) -> int:
        """The level of a reward, at that length."""
        return bisect_right(self.rewards[bisect_right(self.words, words)], reward)

    def to_json(self) -> Any:
        """The edges alone if there is one band."""
        if not self.words:
            return list(self.rewards[0])
        return {"words": list(self.words), "rewards": [list(edges) for edges in self.rewards]}

    @classmethod
    def from_json(cls, data: Any) -> Levels:
        """The inverse of `to_json`."""
        if isinstance(data, list):
            return cls((), (tuple(data),))
        return cls(tuple(data["words"]), tuple(tuple(edges) for edges in data["rewards"]))


Edges = Mapping[str, Levels]  # by task


def level_edges(
    samples: Sequence[Sample],
    rewards: npt.NDArray[np.float32],
    levels: int = RELEVANCE_LEVELS,
    *,
    bands: int = 1,
    together: bool = False,
    top: float | None = None,
) -> Edges:
    """Quantiles of the rewards of each task, in `bands` bands of equally many samples.

    together: every task has the quantiles of all rewards. top: the reward from which on the level
    is the highest one; the others then are quantiles of the rewards below.
    """
    by_task: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for sample, reward in zip(samples, rewards, strict=True):
        by_task[sample.task].append((sample.words, float(reward)))
    if together:
        return dict.fromkeys(by_task, Levels((), (_edges(rewards, levels, top),)))
    return {task: _of_task(np.array(rows), levels, bands, top) for task, rows in by_task.items()}


def _of_task(rows: npt.NDArray[np.float64], levels: int, bands: int, top: float | None) -> Levels:
    words, rewards = rows[:, 0], rows[:, 1]
    inner = np.quantile(words, np.arange(1, bands) / bands)
    bounds = sorted({int(bound) for bound in np.ceil(inner)} - {int(words.min())})
    band = np.searchsorted(bounds, words, "right")
    # A bound above which nothing is left would make an empty band.
    bounds = [bound for i, bound in enumerate(bounds, 1) if (band == i).any()]
    band = np.searchsorted(bounds, words, "right")
    return Levels(
        tuple(bounds),
        tuple(_edges(rewards[band == i], levels, top) for i in range(len(bounds) + 1)),
    )


def _edges(rewards: npt.NDArray[Any], levels: int, top: float | None) -> tuple[float, ...]:
    if top is None:
        return tuple(np.quantile(rewards, np.arange(1, levels) / levels).round(4).tolist())
    below = rewards[rewards < top]
    inner = np.arange(1, levels - 1) / (levels - 1)
    quantiles = np.quantile(below, inner) if below.size else np.full(inner.size, top)
    return (*quantiles.round(4).tolist(), top)
