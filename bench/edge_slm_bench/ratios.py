"""The interval of a ratio of medians whose values come in processes.

Requests of one process share its luck (the memory pages it got, the clock, its neighbours),
so the bootstrap draws whole processes. Few of them make a bootstrap too sure of itself: its
quantiles are widened as a t interval is (the expanded percentile interval of Hesterberg,
"What Teachers Should Know About the Bootstrap", arXiv 1411.5279).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Processes = Sequence[Sequence[float]]  # the values of each, at least one
RESAMPLES = 1000
LEAST_PROCESSES = 3  # that an interval needs on each side


def ratio_interval(before: Processes, after: Processes) -> tuple[float, float] | None:
    """95% interval of median(after) ÷ median(before), of positive values; None where a side
    has too few processes."""
    least = min(len(before), len(after))
    if least < LEAST_PROCESSES:
        return None
    tail = NormalDist().cdf(-sqrt(least / (least - 1)) * student(least - 1))
    low, high = np.quantile(_medians(after, 1) / _medians(before, 0), [tail, 1 - tail])
    return float(low), float(high)


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t (Abramowitz & Stegun 26.7.5; 1% off from 3 on)."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def _medians(processes: Processes, seed: int) -> npt.NDArray[np.float64]:
    """[RESAMPLES]: the median of all values of as many processes, drawn with replacement."""
    count = len(processes)
    values = np.concatenate([np.asarray(process, float) for process in processes])
    order = np.argsort(values, kind="stable")
    owner = np.repeat(np.arange(count), [len(process) for process in processes])[order]
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    # How often each process was drawn, and with it each of its values: a weighted median.
    drawn = (draws[:, :, None] == np.arange(count)).sum(1)
    total = np.cumsum(drawn[:, owner], 1)
    half = total[:, -1:] / 2
    ordered = values[order]
    lower, upper = ordered[(total < half).sum(1)], ordered[(total <= half).sum(1)]
    middle: npt.NDArray[np.float64] = (lower + upper) / 2
    return middle
