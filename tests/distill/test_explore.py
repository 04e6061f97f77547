from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm.distill.buffer import Buffer
from edge_slm.distill.explore import command
from edge_slm.distill.levels import level_edges
from edge_slm.distill.samples import Sample


def sample(number: int, words: int, task: str = "image") -> Sample:
    return Sample(f"r{number}", " ".join(["w"] * words), task)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(-1, 1, width=32)), max_size=60),
    st.integers(1, 20),
)
def test_the_buffer_keeps_the_best_of_each_task(
    rows: list[tuple[int, float]], capacity: int
) -> None:
    buffer, whole = Buffer(capacity), Buffer(10**6)
    half = len(rows) // 2
    samples = [sample(n, 2, "image" if n % 2 else "tags") for n, _ in rows]
    rewards = [r for _, r in rows]
    for part in (slice(0, half), slice(half, None)):
        buffer.add(samples[part], rewards[part])
        whole.add(samples[part], rewards[part])
    for task in {s.task for s in samples}:
        kept = [
            r for s, r in zip(buffer.samples(), buffer.rewards(), strict=True) if s.task == task
        ]
        assert kept == sorted(kept, reverse=True)
        assert len(kept) <= capacity
    assert len(set(whole.samples())) == len(whole.samples()) == len(set(samples))
    if capacity >= len(rows):
        assert buffer.samples() == whole.samples()


def test_bands_are_of_length_and_empty_ones_are_left_out() -> None:
    buffer = Buffer(1000)
    buffer.add([sample(n, n % 40 + 1) for n in range(400)], [n / 400 for n in range(400)])
    bands = buffer.best("image", 5, bands=4)
    lengths = [[s.words for s, _ in band] for band in bands]
    assert all(max(one) < min(two) for one, two in itertools.pairwise(lengths))
    assert all(len(band) == 5 for band in bands)
    assert len(buffer.best("image", 5)) == 1
    same = Buffer(1000)
    same.add([sample(n, 7) for n in range(20)], [0.5] * 20)
    assert [len(band) for band in same.best("image", 3, bands=8)] == [3]


def test_a_command_is_a_little_more_than_the_best_had() -> None:
    rng = random.Random(0)
    samples = [sample(n, 10 + n % 3) for n in range(1000)]
    rewards = np.linspace(0, 1, 1000).astype(np.float32)
    edges = level_edges(samples, rewards)["image"]
    best = [(s, float(r)) for s, r in zip(samples[400:500], rewards[400:500], strict=True)]
    asked = [command("image", best, edges, rng) for _ in range(200)]
    assert {c.words for c in asked} == {11}  # their mean
    # Rewards 0.40 … 0.50: mean 0.45, deviation 0.03: still level 4.
    assert {c.relevance for c in asked} == {4}
    wide = [best[0], best[-1], (samples[0], 0.9), (samples[1], 0.0)]
    levels = [command("image", wide, edges, rng).relevance or 0 for _ in range(200)]
    assert min(levels) == 4
    assert max(levels) == pytest.approx(7, abs=1)
