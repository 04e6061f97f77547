"""What a reward is: a name and a score per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_slm.distill.samples import Sample
from edge_slm.progress import Progress

Float32 = npt.NDArray[np.float32]


class Reward(Protocol):
    """Scores a response as an answer to its request."""

    name: str

    def score(self, samples: Sequence[Sample], progress: Progress | None = None) -> Float32:
        """float32 [len(samples)], finite; higher is better."""
