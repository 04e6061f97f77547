"""What generations are worth: do they follow the command, are they varied, and how sure is that?

Arrays of generations have one row per request and one column per command;
nan where a request was not given that command. Intervals resample whole
requests, because the answers to one request are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm_runtime.length import tolerance

Float64 = npt.NDArray[np.float64]
Statistic = Callable[..., float]
RESAMPLES = 1000
LEAST = 5  # requests that an interval needs


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure of n requests and its 95% interval; nan where it is not defined."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON-ready: null for nan."""
        figures = {"value": self.value, "low": self.low, "high": self.high}
        return {k: float(v) if np.isfinite(v) else None for k, v in figures.items()} | {"n": self.n}


def bootstrap(statistic: Statistic, *arrays: Any) -> Estimate:
    """Percentile bootstrap over the first axis (requests) of all arrays together.

    Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. A handful
    of requests says too little about the others: below 5 the interval is nan.
    """
    n = len(arrays[0])
    value = statistic(*arrays) if n else float("nan")
    values = [statistic(*(a[rows] for a in arrays)) for rows in _draws(n)]
    return _percentiles(value, np.array(values), n)


def bootstrap_mean(values: Float64) -> Estimate:
    """`bootstrap` of `mean`, without a loop."""
    return _bootstrap_sums(_sums(values))


def bootstrap_ratio(above: Float64, below: Float64) -> Estimate:
    """`bootstrap` of the ratio of two means over the same requests, without a loop."""
    return _bootstrap_sums(_sums(above), _sums(below))


def wilson(hits: int, n: int) -> Estimate:
    """A share with its score interval (Wilson, JASA 22, 1927), which few or equal grades do
    not make too narrow; nan without any."""
    if not n:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    z = 1.959964  # of 95%
    share = hits / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def _draws(n: int) -> npt.NDArray[np.int64]:
    """Row indices [RESAMPLES, n]; the same ones for every figure of as many requests."""
    return np.random.default_rng(0).integers(max(n, 1), size=(RESAMPLES if n >= LEAST else 0, n))


def _percentiles(value: float, values: Float64, n: int) -> Estimate:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Estimate(value, float("nan"), float("nan"), n)
    low, high = np.quantile(finite, [0.025, 0.975])
    return Estimate(value, float(low), float(high), n)


def _sums(values: Float64) -> Float64:
    """[requests, 2]: sum and number of each request's known entries."""
    rows = values.reshape(len(values), int(np.prod(values.shape[1:])))
    known = np.isfinite(rows)
    return np.stack([np.where(known, rows, 0).sum(1), known.sum(1)], 1)


def _bootstrap_sums(above: Float64, below: Float64 | None = None) -> Estimate:
    """Of sum ÷ number, or of that of `above` ÷ that of `below`."""

    def figure(rows: npt.NDArray[np.int64]) -> Float64:
        totals = above[rows].sum(-2)
        means = totals[..., 0] / totals[..., 1]
        if below is not None:
            totals = below[rows].sum(-2)
            means = means / (totals[..., 0] / totals[..., 1])
        return np.asarray(means)

    n = len(above)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _percentiles(float(figure(np.arange(n))), figure(_draws(n)), n)


def half_samples(statistic: Statistic, *arrays: Any, resamples: int = 200) -> Estimate:
    """The interval of a figure that counts what is different, such as `distinct`.

    Drawing with replacement would repeat texts and so lower it. The standard
    deviation over halves drawn without replacement estimates the standard error
    (delete-d jackknife with d = n/2; Shao & Wu, Annals of Statistics 17, 1989).
    """
    n = len(arrays[0])
    value = statistic(*arrays) if n else float("nan")
    rng = np.random.default_rng(0)
    halves = [rng.permutation(n)[: n // 2] for _ in range(resamples if n >= LEAST else 0)]
    values = [statistic(*(a[rows] for a in arrays)) for rows in halves]
    error = 1.96 * float(np.std(values)) if values else float("nan")
    return Estimate(value, value - error, value + error, n)


def mean(values: Float64) -> float:
    """Of the entries that are not nan."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


# -- commands against outcomes -----------------------------------------------


def ranks(values: Any) -> Float64:
    """Ranks from 1; ties share their mean rank."""
    array = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse].reshape(len(array)))


def spearman(x: Any, y: Any) -> float:
    """Spearman's rank correlation: Pearson's of the ranks; nan when one side is constant."""
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    known = np.isfinite(x) & np.isfinite(y)
    a, b = ranks(x[known]), ranks(y[known])
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def concordance(asked: Float64, achieved: Float64) -> Float64:
    """[requests, 2]: how often the higher of two commands of one request gave more (a tie
    counts half), and how many pairs of commands there were."""
    i, j = np.triu_indices(asked.shape[1], 1)
    steps = np.sign(asked[:, j] - asked[:, i]) * np.sign(achieved[:, j] - achieved[:, i])
    counts = np.isfinite(steps) & (asked[:, i] != asked[:, j])
    return np.stack([np.where(counts, (steps + 1) / 2, 0).sum(1), counts.sum(1)], 1)


def monotonicity(asked: Float64, achieved: Float64) -> Estimate:
    """Probability that the higher of two commands of one request gave more: 1 always,
    0.5 the command has no influence. (1 + Kendall's tau) / 2, within requests."""
    return _bootstrap_sums(concordance(asked, achieved))


def within_tolerance(asked: Float64, achieved: Float64) -> Float64:
    """1 within ±10% or ±2 words (edge_slm_runtime.length), else 0; nan where not asked."""

    def hit(words: float, got: float) -> float:
        if not np.isfinite(words + got):
            return float("nan")
        low, high = tolerance(int(words))
        return float(low <= got <= high)

    hits = [hit(w, got) for w, got in zip(asked.ravel(), achieved.ravel(), strict=True)]
    return np.array(hits).reshape(asked.shape)


def adherence(asked: Float64, achieved: Float64, hits: Float64) -> dict[str, Any]:
    """All figures of one axis, JSON-ready.

    hit_rate: mean of `hits`. mean_absolute_error: in the axis's unit. spearman:
    asked against achieved over all generations. monotonicity: within requests.
    """
    return {
        "generations": int(np.isfinite(achieved).sum()),
        "hit_rate": bootstrap_mean(hits).as_dict(),
        "mean_absolute_error": bootstrap_mean(np.abs(asked - achieved)).as_dict(),
        "spearman": bootstrap(spearman, asked, achieved).as_dict(),
        "monotonicity": monotonicity(asked, achieved).as_dict(),
    }


def confusion(asked: Any, achieved: Any, size: int) -> npt.NDArray[np.int64]:
    """Counts [size, size]: row asked, column achieved, both indices; nan is left out."""
    asked, achieved = np.asarray(asked, float).ravel(), np.asarray(achieved, float).ravel()
    known = np.isfinite(asked) & np.isfinite(achieved)
    table = np.zeros((size, size), np.int64)
    np.add.at(table, (asked[known].astype(int), achieved[known].astype(int)), 1)
    return table


# -- texts --------------------------------------------------------------------


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n (Li et al., arXiv 1510.03055): unique n-grams ÷ all n-grams of all texts.

    It falls with the amount of text: compare only sets of like size and length.
    """
    grams = [
        tuple(words[i : i + n])
        for words in (text.lower().split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else float("nan")


def copied_words(request: str, text: str) -> float:
    """Share of the request's content words (over 3 letters) that survive in the text;
    nan when it has none."""
    content = _content(request)
    return len(content & _content(text)) / len(content) if content else float("nan")


def echo(request: str, text: str) -> float:
    """Share of the text's content words, counted with repeats, that are the request's own:
    1 adds nothing. nan when the text has none."""
    said = [word for word in _words(text) if len(word) > 3]
    return sum(word in _content(request) for word in said) / len(said) if said else float("nan")


def self_similarity(vectors: npt.NDArray[np.floating[Any]], groups: Sequence[str]) -> Float64:
    """[n, n]: cosine of every two different texts of one group, nan elsewhere.

    Its mean says how alike the texts are. vectors: [n, width].
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms, norms, 1)
    names = np.asarray(groups)
    same = (names[:, None] == names) & ~np.eye(len(names), dtype=bool)
    return np.where(same, (unit @ unit.T).astype(np.float64), np.nan)


def _content(text: str) -> set[str]:
    return {word for word in _words(text) if len(word) > 3}


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
