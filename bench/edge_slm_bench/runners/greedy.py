"""Greedy decoding of the peers that are driven step by step: the argmax of the last logits.

There is no sampler, no text and no check, so the engine alone is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt

from edge_slm_bench.runners.base import Float32, Prompt, TimedAnswer

Int64 = npt.NDArray[np.int64]


class GreedyRunner(ABC):
    """A `Runner` driven by `reset()` and `step()`."""

    def single(self, prompt: Prompt, new_tokens: int) -> TimedAnswer:
        start = perf_counter()
        ids, seconds = self._answer(np.array([prompt.ids], np.int64), new_tokens, start)
        return TimedAnswer(tuple(ids[0].tolist()), tuple(seconds))

    def batch(self, prompts: Sequence[Prompt], new_tokens: int) -> list[tuple[int, ...]]:
        ids, _ = self._answer(np.array([p.ids for p in prompts], np.int64), new_tokens, 0)
        return [tuple(row) for row in ids.tolist()]

    def logits(self, ids: Sequence[int]) -> Float32:
        self.reset(1, len(ids))
        rows: Float32 = self.step(np.array([ids], np.int64), every=True)[0].copy()
        return rows

    def close(self) -> None:
        vars(self).clear()

    @abstractmethod
    def reset(self, rows: int, prompt_tokens: int) -> None:
        """Starts anew with an empty cache for `rows` answers."""

    @abstractmethod
    def step(self, ids: Int64, *, every: bool = False) -> Float32:
        """Takes ids [R,S] as the next tokens; logits [R,1,V] of the last position, or
        [R,S,V] when asked for `every` one. The array may be overwritten by the next step."""

    def _answer(self, ids: Int64, new_tokens: int, start: float) -> tuple[Int64, list[float]]:
        """Tokens [R, new_tokens], and the seconds since `start` at which each was there."""
        self.reset(*ids.shape)
        tokens, seconds = [], []
        for _ in range(new_tokens):
            ids = self.step(ids)[:, -1].argmax(-1)[:, None]
            tokens.append(ids)
            seconds.append(perf_counter() - start)
        return np.concatenate(tokens, 1), seconds
