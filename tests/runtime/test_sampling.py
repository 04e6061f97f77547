from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm_runtime.errors import BadSetting, EngineError
from edge_slm_runtime.sampling import (
    Sampler,
    Sampling,
    drawn,
    log_probability,
    penalise,
    probabilities,
)


def make_logits(seed: int, size: int = 50) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [
        *((1.0, 0, 1.0, 1.0), (0.7, 0, 1.0, 1.0), (1.0, 5, 1.0, 1.0), (1.0, 0, 0.8, 1.0)),
        *((1.3, 20, 0.9, 1.2), (0.5, 1, 1.0, 1.0), (1.0, 999, 0.01, 0.7)),
    ],
)
def test_same_distribution_as_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    logits, prompt = make_logits(seed), [3, 4, 4, 20]
    steps = [transformers.RepetitionPenaltyLogitsProcessor(penalty)]
    steps += [transformers.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    steps += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    steps += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = torch.tensor(logits)[None]
    for step in steps:
        scores = step(torch.tensor([prompt]), scores)
    expected = torch.softmax(scores[0].double(), -1).numpy()

    penalise(logits, set(prompt), penalty)
    ours = probabilities(logits, Sampling(temperature, top_k, top_p, penalty))
    assert np.array_equal(ours > 0, expected > 0)
    assert np.allclose(ours, expected, atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    logits = make_logits(1, 8)
    sampling = Sampling(temperature=1.5, top_k=6, top_p=0.95, no_repeat_ngram_size=0, seed=1)
    sampler = Sampler(sampling, [])
    counts = np.zeros(8)
    for _ in range(20_000):
        counts[sampler.pick(logits.copy())] += 1
    expected = probabilities(logits, sampling)
    assert np.abs(counts / counts.sum() - expected).max() < 0.01
    assert not counts[expected == 0].any()


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-300, 1e-9, 0.3, 1.0]), min_size=1, max_size=400),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_is_where_the_point_lies(weights: list[float], point: float) -> None:
    chances = np.array([*weights, 0.5, *[0.0] * 200])
    token = drawn(chances, point)
    assert chances[token] > 0
    total = chances.sum()
    assert chances[:token].sum() <= point * total + 1e-12
    assert point * total - 1e-12 <= chances[: token + 1].sum()


def test_greedy_takes_the_most_likely() -> None:
    logits = make_logits(2)
    assert Sampler(Sampling(), []).pick(logits.copy()) == int(logits.argmax())


def test_penalty_moves_greedy_off_a_repeat() -> None:
    logits = np.array([0, 2.0, 1.9, -1], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.5), [])
    assert [sampler.pick(logits.copy()) for _ in range(2)] == [1, 2]


@given(st.integers(1, 6), st.integers(0, 2**32), st.booleans())
def test_no_ngram_comes_twice(size: int, seed: int, greedy: bool) -> None:
    sampling = Sampling(temperature=0.0 if greedy else 0.3, no_repeat_ngram_size=size, seed=seed)
    sampler = Sampler(sampling, [])
    answer = [sampler.pick(make_logits(i % 3, 60)) for i in range(50)]  # begs for a loop
    grams = [tuple(answer[i : i + size]) for i in range(len(answer) - size + 1)]
    assert len(set(grams)) == len(grams)


def test_a_loop_is_allowed_when_asked_for() -> None:
    sampler = Sampler(Sampling(no_repeat_ngram_size=0), [])
    assert len({sampler.pick(make_logits(1)) for _ in range(20)}) == 1


@given(st.integers(0, 2**64 - 1))
def test_a_seed_reproduces(seed: int) -> None:
    logits = make_logits(0)
    samplers = [Sampler(Sampling(temperature=2.0, seed=seed), []) for _ in range(2)]
    first, second = ([s.pick(logits.copy()) for _ in range(8)] for s in samplers)
    assert first == second


def test_no_seed_draws_one_and_tells() -> None:
    sampling = Sampling(temperature=1.0)
    first, second = Sampler(sampling, []), Sampler(sampling, [])
    assert first.seed is not None
    assert first.seed != second.seed
    assert Sampler(Sampling(), []).seed is None
    assert Sampler(Sampling(seed=7), []).seed is None, "a greedy answer needs none"


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.5, 3.0]))
def test_masked_tokens_are_never_drawn(seed: int, temperature: float) -> None:
    logits = make_logits(seed)
    logits[10:] = -np.inf
    sampler = Sampler(Sampling(temperature, top_k=30, repetition_penalty=1.1, seed=seed), [1, 40])
    assert all(sampler.pick(logits.copy()) < 10 for _ in range(5))


def test_a_penalty_lifts_no_mask() -> None:
    logits = np.array([-np.inf, 2, -1], np.float32)
    with np.errstate(all="ignore"):
        penalise(logits, {0, 1, 2}, 1e-50)  # a float32 zero: -inf × 0 would be NaN
    assert logits[0] == -np.inf
    assert not np.isnan(logits).any()


def test_log_probability_is_that_of_softmax() -> None:
    logits = make_logits(3).astype(np.float32)
    logits[5:9] = -np.inf
    chances = np.exp(logits.astype(np.float64))
    assert log_probability(logits, (2,)) == pytest.approx(
        np.log(chances[2] / chances.sum()), abs=1e-5
    )


@pytest.mark.parametrize(
    "setting",
    [
        *({"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": "hot"}),
        *({"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"top_p": 0.0}, {"top_p": 1.1}),
        *({"temperature": 1e-310}, {"temperature": 10**400}, {"temperature": True}),
        *({"repetition_penalty": 1e-50}, {"top_p": 1e-60}, {"top_p": True}),
        *({"top_k": 1 << 31}, {"no_repeat_ngram_size": 10**30}, {"top_k": -(10**5000)}),
        *({"repetition_penalty": 0.0}, {"seed": -1}, {"seed": 1.0}, {"seed": 1 << 64}),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(BadSetting, match=name):
        Sampling(**setting)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_predictions_that_are_no_numbers_are_an_error(value: float, temperature: float) -> None:
    logits = np.zeros(8, np.float32)
    logits[:] = value if value == -np.inf else 0
    logits[3] = value
    with pytest.raises(EngineError, match="not finite"):
        Sampler(Sampling(temperature, seed=1), ()).pick(logits)
