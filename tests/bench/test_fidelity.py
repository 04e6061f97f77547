"""Fidelity figures against hand computation and against plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_slm_bench.metrics.fidelity import CHUNK, FidelityMeter, fidelity, log_softmax


def test_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    candidate = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    figures = fidelity(reference, candidate, np.array([0, 1]))
    assert figures.positions == 2
    assert figures.top1 == 0.5
    assert figures.top1_error == pytest.approx(0.5)  # sqrt(p (1 - p) / (n - 1))
    assert figures.perplexity_ratio == pytest.approx(math.sqrt(2))
    # differences log 2 and 0: deviation log 2 / 2 over sqrt(n - 1) = 1
    assert figures.perplexity_ratio_error == pytest.approx(math.sqrt(2) * math.log(2) / 2)
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert figures.kl_mean == pytest.approx(kl / 2)
    assert figures.kl_999 == pytest.approx(0.999 * kl)
    assert figures.max_abs_logit_error == pytest.approx(math.log(2))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 3 * CHUNK), st.integers(0, 1000), st.floats(-1e4, 1e4))
def test_itself_shifted_and_pieces(positions: int, seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((positions, 7)).astype(np.float32)
    other = logits + rng.standard_normal((positions, 7)).astype(np.float32) / 4
    targets = rng.integers(0, 7, positions)
    same = fidelity(logits, logits, targets)
    assert (same.top1, same.perplexity_ratio, same.kl_mean) == (1, 1, 0)
    moved = fidelity(logits, logits.astype(np.float64) + shift, targets)
    assert moved.kl_mean == pytest.approx(0, abs=1e-9)
    assert moved.perplexity_ratio == pytest.approx(1)

    whole = fidelity(logits, other, targets)
    assert whole.kl_mean > 0
    p, q = log_softmax(logits), log_softmax(other)
    rows = np.arange(positions)
    nll_p, nll_q = -p[rows, targets], -q[rows, targets]
    assert whole.perplexity_ratio == pytest.approx(math.exp(nll_q.mean() - nll_p.mean()))
    # llama.cpp's route to the error: both variances and their covariance.
    variance = np.cov(nll_q, nll_p, bias=True)
    paired = variance[0, 0] + variance[1, 1] - 2 * variance[0, 1]
    error = whole.perplexity_ratio * math.sqrt(paired / (positions - 1))
    assert whole.perplexity_ratio_error == pytest.approx(error, rel=1e-5)

    meter, cut = FidelityMeter(), positions // 3
    for part in (slice(0, cut), slice(cut, None)):
        meter.add(logits[part], other[part], targets[part])
    pieces = meter.result()
    assert pieces.as_dict() == pytest.approx(whole.as_dict())


def test_refusals() -> None:
    logits = np.zeros((3, 4))
    with pytest.raises(ValueError, match="at least 2"):
        fidelity(logits[:1], logits[:1], np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="for targets"):
        fidelity(logits, logits[:2], np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="not finite"):
        fidelity(logits, logits * np.nan, np.zeros(3, np.int64))
