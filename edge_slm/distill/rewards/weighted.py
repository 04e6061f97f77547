"""Several rewards as one: their weighted mean, or that times fluency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_slm.distill.rewards.base import Float32, Reward
from edge_slm.distill.samples import Sample
from edge_slm.progress import Progress


class Weighted:
    """The weighted mean of `parts`: (weight above 0, reward) pairs."""

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        self._parts = parts
        self.name = " + ".join(f"{weight:g} {reward.name}" for weight, reward in parts)

    def components(
        self, samples: Sequence[Sample], progress: Progress | None = None
    ) -> dict[str, Float32]:
        """The scores of each part by its name, float32 [len(samples)]."""
        return {reward.name: reward.score(samples, progress) for _, reward in self._parts}

    def combine(self, components: Mapping[str, Float32]) -> Float32:
        """The weighted mean of the scores that `components` returned."""
        weights = [weight for weight, _ in self._parts]
        scores = [components[reward.name] for _, reward in self._parts]
        return np.asarray(np.average(scores, axis=0, weights=weights), np.float32)

    def score(self, samples: Sequence[Sample], progress: Progress | None = None) -> Float32:
        """float32 [len(samples)]."""
        return self.combine(self.components(samples, progress))


class Gated(Weighted):
    """Fluency × the weighted mean of `parts`, in which a cosine counts up to 0.7 only.

    Higher cosines come from repeating the request, not from a better answer.
    """

    ENOUGH = 0.7

    def __init__(self, parts: Sequence[tuple[float, Reward]], gate: Reward) -> None:
        super().__init__(parts)
        self._gate = gate
        self.name = f"{gate.name} × ({self.name})"

    def components(
        self, samples: Sequence[Sample], progress: Progress | None = None
    ) -> dict[str, Float32]:
        """The scores of each part by its name, float32 [len(samples)]."""
        gate = {self._gate.name: self._gate.score(samples)}
        return super().components(samples, progress) | gate

    def combine(self, components: Mapping[str, Float32]) -> Float32:
        """Fluency × the weighted mean of the others."""
        scores = dict(components)
        if "relevance" in scores:
            scores["relevance"] = np.clip(scores["relevance"], 0, self.ENOUGH) / self.ENOUGH
        return np.asarray(scores[self._gate.name] * super().combine(scores), np.float32)
