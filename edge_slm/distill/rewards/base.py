"""What every reward offers: a name and a score per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_slm.distill.samples import Sample

Array = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]  # (done, total) texts


class Reward(Protocol):
    """What a response is worth as an answer to its request."""

    name: str

    def score(self, samples: Sequence[Sample], progress: Progress | None = None) -> Array:
        """float32 [len(samples)], finite; higher is better."""
