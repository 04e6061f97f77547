"""The samples that training uses: sorted by reward, bounded per task."""

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
        """A pair of request and response that is there already is not added again."""
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
            # The sort is stable: of equal rewards the older sample stays.
            self._by_task[task] = sorted(unique, key=lambda r: -r[1])[: self._capacity]

    def samples(self) -> list[Sample]:
        return [sample for rows in self._by_task.values() for sample, _ in rows]

    def rewards(self) -> npt.NDArray[np.float32]:
        """In the order of `samples`."""
        return np.array([r for rows in self._by_task.values() for _, r in rows], np.float32)

    def best(self, task: str, count: int, bands: int = 1) -> list[list[Scored]]:
        """The `count` best samples of a task in each of `bands` bands of length, which hold
        about equally many samples; empty bands are left out."""
        rows = self._by_task[task]
        words = np.array([sample.words for sample, _ in rows])
        band = np.searchsorted(np.quantile(words, np.arange(1, bands) / bands), words, "right")
        chosen = [
            [row for row, at in zip(rows, band, strict=True) if at == b] for b in range(bands)
        ]
        return [rows[:count] for rows in chosen if rows]
