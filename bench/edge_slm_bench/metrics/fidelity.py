"""How far a quantised model's predictions are from the reference's.

Formulas as llama.cpp's perplexity tool computes them (`--kl-divergence`): with
p the reference's and q the candidate's distribution at each position and t the
token that really follows,

    perplexity ratio   exp(mean(log p(t) - log q(t)))
    KL divergence      Σ p (log p - log q), mean and 99.9% quantile
    top-1 agreement    share of positions where both have the same most likely token

An error (±) is one standard deviation of the mean, sqrt(variance / (n - 1)); that
of the ratio is of the paired differences, which is what the tool gets from
variances and covariance.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]

CHUNK = 256  # positions at a time, so that the float64 work arrays stay small


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Figures over `positions` predictions; 1 is perfect for `top1` and
    `perplexity_ratio`, 0 for the others. KL in nats."""

    positions: int
    top1: float
    top1_error: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    kl_mean: float
    kl_mean_error: float
    kl_999: float
    max_abs_logit_error: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class FidelityMeter:
    """Collects positions piece by piece and keeps four numbers of each."""

    def __init__(self) -> None:
        self._log_ratio: list[Float64] = []
        self._kl: list[Float64] = []
        self._same_top: list[npt.NDArray[np.bool_]] = []
        self._max_error = 0.0

    def add(self, reference: Logits, candidate: Logits, targets: npt.NDArray[np.int64]) -> None:
        """Adds N positions: logits [N,V] of both, and the tokens [N] that follow.

        Raises ValueError when the shapes differ or a logit is not finite.
        """
        if reference.shape != candidate.shape or reference.shape[:1] != targets.shape:
            raise ValueError(
                f"logits {reference.shape} and {candidate.shape} for targets {targets.shape}"
            )
        for whose, logits in (("reference", reference), ("candidate", candidate)):
            if not np.isfinite(logits).all():
                raise ValueError(f"the {whose}'s logits are not finite")
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            p, q = log_softmax(reference[part]), log_softmax(candidate[part])
            rows, target = np.arange(len(p)), targets[part]
            self._log_ratio.append(p[rows, target] - q[rows, target])
            self._kl.append((np.exp(p) * (p - q)).sum(-1))
            self._same_top.append(p.argmax(-1) == q.argmax(-1))
        if len(targets):
            difference = np.abs(reference.astype(np.float64) - candidate).max()
            self._max_error = max(self._max_error, float(difference))

    def result(self) -> Fidelity:
        """Raises ValueError when fewer than two positions were added."""
        positions = sum(map(len, self._kl))
        if positions < 2:
            raise ValueError(f"fidelity needs at least 2 positions, got {positions}")
        kl = np.concatenate(self._kl)
        log_ratio, log_ratio_error = _mean_and_error(np.concatenate(self._log_ratio))
        kl_mean, kl_error = _mean_and_error(kl)
        top1, top1_error = _mean_and_error(np.concatenate(self._same_top).astype(np.float64))
        return Fidelity(
            positions=positions,
            top1=top1,
            top1_error=top1_error,
            perplexity_ratio=math.exp(log_ratio),
            perplexity_ratio_error=math.exp(log_ratio) * log_ratio_error,
            kl_mean=kl_mean,
            kl_mean_error=kl_error,
            kl_999=float(np.quantile(kl, 0.999)),
            max_abs_logit_error=self._max_error,
        )


def fidelity(reference: Logits, candidate: Logits, targets: npt.NDArray[np.int64]) -> Fidelity:
    """Fidelity of `candidate` [N,V] to `reference` [N,V], next tokens `targets` [N].

    Raises ValueError as `FidelityMeter` does.
    """
    meter = FidelityMeter()
    meter.add(reference, candidate, targets)
    return meter.result()


def log_softmax(logits: Logits) -> Float64:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _mean_and_error(values: Float64) -> tuple[float, float]:
    return float(values.mean()), float(math.sqrt(values.var() / (len(values) - 1)))
