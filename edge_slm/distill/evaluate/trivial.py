"""Baselines that need no model. What scores no better than these has shown nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_slm.distill.evaluate.scorers import Cosine
from edge_slm.distill.samples import Sample
from edge_slm_runtime.length import tolerance

ENDING = "soft natural light, high detail, a calm and balanced composition."


def echoes(samples: Sequence[Sample]) -> list[str | None]:
    """Every request with one fixed ending."""
    return [f"{sample.request.rstrip(' .')}, {ENDING}" for sample in samples]


def nearest(
    samples: Sequence[Sample], train: Sequence[Sample], encoder: Cosine
) -> list[str | None]:
    """The response of training to the most similar request of the task, of those as long as the
    reference (±10% or ±2 words) where there are some. None for a task without training samples.
    """
    answers: list[str | None] = [None] * len(samples)
    for task in {sample.task for sample in samples}:
        known = [sample for sample in train if sample.task == task]
        at = [i for i, sample in enumerate(samples) if sample.task == task]
        if not known:
            continue
        words = np.array([sample.words for sample in known])
        theirs = encoder.embed([sample.request for sample in known])
        mine = encoder.embed([samples[i].request for i in at])
        for i, likeness in zip(at, mine @ theirs.T, strict=True):
            low, high = tolerance(samples[i].words)
            fits = (words >= low) & (words <= high)
            chosen = np.where(fits | ~fits.any(), likeness, -np.inf).argmax()
            answers[i] = known[int(chosen)].response
    return answers
