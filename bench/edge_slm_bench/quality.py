"""Command adherence: how closely generations follow what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_slm_runtime.length import tolerance


def ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Ranks from 1; ties share their mean rank."""
    array = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean = last - (counts - 1) / 2
    return np.asarray(mean[inverse].reshape(len(array)))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks; nan when one side is constant."""
    a, b = ranks(x), ranks(y)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


@dataclass(frozen=True, slots=True)
class LengthAdherence:
    """n generations: rank correlation, share within tolerance, mean absolute error in words."""

    n: int
    spearman: float
    in_tolerance: float
    mean_absolute_error: float


def length_adherence(asked: Sequence[int], achieved: Sequence[int]) -> LengthAdherence:
    """Tolerance is ±10% or ±2 words, whichever is wider (edge_slm_runtime.length)."""
    hits = [lo <= got <= hi for (lo, hi), got in zip(map(tolerance, asked), achieved, strict=True)]
    errors = np.abs(np.asarray(asked) - np.asarray(achieved))
    return LengthAdherence(
        len(hits), spearman(asked, achieved), float(np.mean(hits)), float(errors.mean())
    )


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n (Li et al., arXiv 1510.03055): unique n-grams ÷ all n-grams of all texts."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.lower().split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def copied_words(requests: Sequence[str], texts: Sequence[str]) -> float:
    """Mean share of a request's content words (over 3 letters) that survive in its text."""
    shares = []
    for request, text in zip(requests, texts, strict=True):
        content = {w for w in _words(request) if len(w) > 3}
        if content:
            shares.append(len(content & set(_words(text))) / len(content))
    return float(np.mean(shares)) if shares else float("nan")


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
