from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm_bench.metrics.quality import (
    LEAST,
    adherence,
    bootstrap,
    bootstrap_mean,
    bootstrap_ratio,
    confusion,
    copied_words,
    distinct,
    echo,
    half_samples,
    mean,
    monotonicity,
    ranks,
    self_similarity,
    spearman,
    within_tolerance,
)

NAN = float("nan")


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
    assert spearman([1, 2, NAN, 3, 4], [2, 1, 9, 3, 4]) == pytest.approx(0.8)


def test_bootstrap_of_a_mean_agrees_with_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = bootstrap(mean, values)
    error = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(found.value - error, abs=0.04)
    assert found.high == pytest.approx(found.value + error, abs=0.04)
    assert found == bootstrap(mean, values)  # the same figures in every run


def test_bootstrap_draws_requests_not_generations() -> None:
    one = np.random.default_rng(2).normal(size=60)
    many = np.repeat(one[:, None], 10, axis=1)  # ten times the rows, nothing new in them
    alone, repeated = bootstrap(mean, one), bootstrap(mean, many)
    assert repeated.low == pytest.approx(alone.low)
    assert repeated.high == pytest.approx(alone.high)
    assert repeated.n == 60


def test_no_interval_from_a_handful_and_no_nan_in_json() -> None:
    few = bootstrap(mean, np.arange(LEAST - 1.0))
    assert few.as_dict() == {"value": 1.5, "low": None, "high": None, "n": LEAST - 1}
    assert bootstrap(mean, np.array([])).as_dict()["value"] is None
    assert bootstrap_mean(np.full((9, 2), NAN)).as_dict()["value"] is None
    assert bootstrap(spearman, np.ones(9), np.arange(9.0)).as_dict()["value"] is None
    assert half_samples(distinct, np.array(["a b"] * 3, object)).as_dict()["low"] is None


def test_the_ratio_of_a_set_and_itself_is_exactly_one() -> None:
    values = np.random.default_rng(3).random(50)
    found = bootstrap_ratio(values, values)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_the_shortcuts_are_the_bootstrap() -> None:
    rng = np.random.default_rng(5)
    above, below = rng.random((40, 3)), rng.random((40, 1))
    above[rng.random((40, 3)) < 0.2] = NAN
    for short, long in (
        (bootstrap_mean(above), bootstrap(mean, above)),
        (bootstrap_ratio(above, below), bootstrap(lambda a, b: mean(a) / mean(b), above, below)),
    ):
        assert astuple(short) == pytest.approx(astuple(long))


def test_half_samples_estimate_the_standard_error() -> None:
    values = np.random.default_rng(4).normal(0, 1, 400)
    found = half_samples(lambda v: float(v.mean()), values, resamples=2000)
    assert found.high - found.value == pytest.approx(1.96 / 20, rel=0.1)


def test_monotonicity_compares_only_commands_of_one_request() -> None:
    asked = np.array([[1.0, 2, 3]] * 6)
    rising = np.array([[base, base + 1, base + 2] for base in range(0, 60, 10)], float)
    assert monotonicity(asked, rising).value == 1
    assert monotonicity(asked, -rising).value == 0
    assert monotonicity(asked, np.ones_like(rising)).value == 0.5  # all ties
    gaps = rising.copy()
    gaps[:, 1] = NAN
    assert monotonicity(asked, gaps).value == 1
    assert math.isnan(monotonicity(asked[:, :1], rising[:, :1]).value)


def test_within_tolerance_is_the_runtimes() -> None:
    asked = np.array([[10, 10, 40, 40, 40, NAN]])
    got = np.array([[12, 13, 44, 45, NAN, 1]])
    hits = within_tolerance(asked, got)
    assert hits[0, :4].tolist() == [1, 0, 1, 0]
    assert np.isnan(hits[0, 4:]).all()


def test_adherence_of_a_perfect_and_of_an_ignoring_model() -> None:
    asked = np.tile([8.0, 16, NAN, 32], (20, 1))
    perfect = adherence(asked, asked, within_tolerance(asked, asked))
    assert perfect["generations"] == 60
    assert perfect["hit_rate"] == {"value": 1, "low": 1, "high": 1, "n": 20}
    assert perfect["mean_absolute_error"]["value"] == 0
    assert perfect["spearman"]["value"] == pytest.approx(1)
    assert perfect["monotonicity"]["value"] == 1
    same = np.where(np.isfinite(asked), 16, NAN)
    deaf = adherence(asked, same, within_tolerance(asked, same))
    assert deaf["hit_rate"]["value"] == pytest.approx(1 / 3)
    assert deaf["spearman"]["value"] is None
    assert deaf["monotonicity"]["value"] == 0.5


def test_confusion_counts_and_leaves_out_what_was_not_asked() -> None:
    table = confusion([[0, 1, NAN]], [[0, 2, 1]], 3)
    assert table.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_diversity_and_copying() -> None:
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["one two three"], 2) == 1
    assert copied_words("a red fox, running", "The fox was running") == 1
    assert copied_words("stone bridge", "a bridge") == pytest.approx(0.5)
    assert math.isnan(copied_words("a fox", "a fox"))  # no word of over 3 letters


def test_echo_rises_with_every_repeat() -> None:
    request = "stone bridge"
    once = echo(request, "stone bridge, gentle morning light")
    twice = echo(request, "stone bridge, stone bridge, gentle morning light")
    assert 0 < once < twice < echo(request, "Stone bridge! stone bridge") == 1


def test_self_similarity_compares_within_groups_and_never_with_itself() -> None:
    vectors = np.array([[1.0, 0], [2, 0], [0, 1], [0, 0]])
    table = self_similarity(vectors, ["a", "a", "b", "b"])
    assert table[0, 1] == pytest.approx(1)
    assert table[2, 3] == 0  # a text without a vector
    assert np.isnan([table[0, 0], table[0, 2]]).all()
