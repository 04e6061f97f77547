"""Keyword coverage as a reward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_slm.distill.rewards.base import Float32
from edge_slm.distill.samples import Sample
from edge_slm.progress import Progress
from edge_slm_runtime.keywords import coverage


class Keywords:
    """`coverage`, 0 … 1."""

    name = "keywords"

    def score(self, samples: Sequence[Sample], progress: Progress | None = None) -> Float32:
        """float32 [len(samples)]."""
        scores = [coverage(sample.request, sample.response) for sample in samples]
        return np.array(scores, np.float32)
