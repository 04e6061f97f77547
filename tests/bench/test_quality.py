from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm_bench.quality import copied_words, distinct, length_adherence, ranks, spearman


def test_ties_share_their_mean_rank() -> None:
    assert ranks([10, 20, 20, 5]).tolist() == [2, 3.5, 3.5, 1]


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=30))
def test_spearman_sees_only_the_order(values: list[int]) -> None:
    cubes = [float(v) ** 3 for v in values]
    if len(set(values)) == 1:
        assert math.isnan(spearman(values, cubes))
    else:
        assert spearman(values, cubes) == pytest.approx(1)
        assert spearman(values, [-c for c in cubes]) == pytest.approx(-1)


def test_spearman_of_a_worked_example() -> None:
    # 1 - 6 Σd² / n(n² - 1) with d = (1, 1, 0, 0): 0.8
    assert spearman([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)


def test_length_adherence_uses_the_tolerance_of_the_runtime() -> None:
    result = length_adherence([10, 10, 40, 40], [12, 13, 44, 45])
    assert result.in_tolerance == 0.5
    assert result.mean_absolute_error == pytest.approx(np.mean([2, 3, 4, 5]))


def test_diversity_and_copying() -> None:
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["one two three"], 2) == 1
    assert copied_words(["a red fox, running"], ["The fox was running"]) == pytest.approx(1)
    assert copied_words(["stone bridge"], ["a bridge"]) == pytest.approx(0.5)
