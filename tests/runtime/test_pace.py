"""Which threads compute a pass, by what passes took: on machines whose times are made up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from edge_slm_runtime.engines.pace import Pace

PASSES = 3000
Times = Callable[[random.Random], float]  # of a pass


def quiet(seconds: float) -> Times:
    """As on a machine with nothing else to do, but for an interruption now and then."""
    return lambda draw: seconds * draw.uniform(0.95, 1.1) * (10 if draw.random() < 0.002 else 1)


def stalled(seconds: float, share: float, longest: float) -> Times:
    """A share of the passes waits for a thread that has lost its core."""

    def times(draw: random.Random) -> float:
        stall = longest * draw.random() if draw.random() < share else 0.0
        return seconds * draw.uniform(1.0, 1.3) + stall

    return times


def computed(pace: Pace, together: Times, alone: Times, seed: int) -> tuple[float, float]:
    """What passes took on average, and the share of them that the caller computed alone."""
    draw, took, by_caller = random.Random(seed), 0.0, 0
    for _ in range(PASSES):
        by_caller += pace.alone
        seconds = (alone if pace.alone else together)(draw)
        pace.note(seconds)
        took += seconds
    return took / PASSES, by_caller / PASSES


def mean(times: Times, seed: int) -> float:
    draw = random.Random(seed)
    return sum(times(draw) for _ in range(PASSES)) / PASSES


@pytest.mark.parametrize("seed", range(8))
def test_threads_that_gain_are_taken(seed: int) -> None:
    took, by_caller = computed(Pace(alone=False), quiet(1.0), quiet(1.8), seed)
    assert took < 1.05 * mean(quiet(1.0), seed)
    assert by_caller < 0.05


@pytest.mark.parametrize("seed", range(8))
def test_under_load_it_is_about_as_quick_as_one_thread(seed: int) -> None:
    together, alone = stalled(1.0, 0.5, 8.0), stalled(1.8, 0.1, 4.0)
    took, by_caller = computed(Pace(alone=False), together, alone, seed)
    assert mean(together, seed) > 1.3 * mean(alone, seed)
    assert took < 1.1 * mean(alone, seed)
    assert by_caller > 0.8


@pytest.mark.parametrize("seed", range(8))
def test_threads_that_gain_nothing_rest(seed: int) -> None:
    _, by_caller = computed(Pace(alone=False), quiet(1.0), quiet(1.0), seed)
    assert by_caller > 0.85


@pytest.mark.parametrize("seed", range(8))
def test_it_follows_a_load_that_comes_and_goes(seed: int) -> None:
    pace = Pace(alone=False)
    computed(pace, quiet(1.0), quiet(1.8), seed)
    assert not pace.alone
    together, alone = stalled(1.0, 0.5, 8.0), stalled(1.8, 0.1, 4.0)
    took, by_caller = computed(pace, together, alone, seed)
    assert took < 1.1 * mean(alone, seed)
    assert by_caller > 0.8
    took, by_caller = computed(pace, quiet(1.0), quiet(1.8), seed)
    assert by_caller < 0.5  # it waits up to 1024 passes before it tries again
    assert took < 1.4


def test_the_first_way_is_as_told_and_the_other_is_tried_soon() -> None:
    for alone in (True, False):
        pace, ways = Pace(alone=alone), []
        for _ in range(8):
            ways.append(pace.alone)
            pace.note(1.0)
        assert ways == [alone] * 4 + [not alone] * 4
