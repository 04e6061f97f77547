"""The episodes that training learns from: sorted by reward, bounded per task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_slm.distill.samples import Sample

Scored = tuple[Sample, float]  # a sample and its reward


class Buffer:
    """Keeps the `capacity` samples of each task with the highest reward, best first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_task: dict[str, list[Scored]] = defaultdict(list)

    def add(self, samples: Sequence[Sample], rewards: Sequence[float]) -> None:
        """A text that answers the same request again is not added again."""
        for sample, reward in zip(samples, rewards, strict=True):
            self._by_task[sample.task].append((sample, float(reward)))
        for task, rows in self._by_task.items():
            seen: set[tuple[str, str]] = set()
            unique = []
            for row in rows:
                key = (row[0].request, row[0].response)
                if key not in seen:
                    seen.add(key)
                    unique.append(row)
            # The sort is stable: of equal rewards the older one stays.
            self._by_task[task] = sorted(unique, key=lambda r: -r[1])[: self._capacity]

    def samples(self) -> list[Sample]:
        return [sample for rows in self._by_task.values() for sample, _ in rows]

    def rewards(self) -> npt.NDArray[np.float32]:
        """In the order of `samples`."""
        return np.array([r for rows in self._by_task.values() for _, r in rows], np.float32)

    def best(self, task: str, count: int, band: int = 0, bands: int = 1) -> list[Scored]:
        """The `count` best of a task, of one of `bands` equally filled bands of length."""
        rows = self._by_task[task]
        if bands > 1:
            words = np.array([sample.words for sample, _ in rows])
            edges = np.quantile(words, np.arange(1, bands) / bands)
            inside = np.searchsorted(edges, words, "right") == band
            rows = [row for row, chosen in zip(rows, inside, strict=True) if chosen] or rows
        return rows[:count]
