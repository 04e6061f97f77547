"""Guessing tokens makes answers faster and never other ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_slm_runtime import SLM, Generation, Request, load
from edge_slm_runtime.engines.stepping import SteppingEngine
from edge_slm_runtime.ngrams import ORDER, NGrams

from .conftest import GUESSING

TEXTS = ("a cosy cabin in the snow", "neon street in the rain, reflections", "misty forest")


class Told:
    """Guesses what it was told the answer is, wrong here and there."""

    def __init__(self) -> None:
        self.answer: Sequence[int] = ()
        self.random = random.Random(4)

    def guess(self, before: Sequence[int], most: int) -> list[int]:
        found = [
            list(self.answer[i : i + most])
            for i in range(1, len(self.answer))
            if tuple(self.answer[max(0, i - ORDER) : i]) == tuple(before[-min(i, ORDER) :])
        ]
        guess = found[-1] if found else []
        return [token if self.random.random() < 0.8 else 70 for token in guess]

    def learn(self, before: Sequence[int], token: int) -> None: ...

    def learn_all(self, ids: Sequence[int]) -> None: ...


@pytest.fixture(scope="module", params=GUESSING, ids="-".join)
def slm(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[tuple[SLM, Told]]:
    with load(tiny_bundle, *request.param, threads=1, speculate=True) as loaded:
        assert isinstance(loaded._engine, SteppingEngine)
        told = Told()
        loaded._engine._ngrams = told  # type: ignore[assignment]
        yield loaded, told


def both(slm: tuple[SLM, Told], text: str, **asked: Any) -> tuple[Generation, Generation]:
    """The answer without guesses, and with mostly right ones."""
    model, told = slm
    told.answer = ()
    plain = model.generate(text, **asked)
    told.answer = (*plain.token_ids, 0)
    return plain, model.generate(text, **asked)


def same(a: Generation, b: Generation) -> bool:
    return (a.text, a.token_ids, a.finish_reason, a.seed) == (
        (b.text, b.token_ids, b.finish_reason, b.seed)
    )


ASKED = st.fixed_dictionaries(
    {
        "words": st.one_of(st.none(), st.integers(1, 12)),
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 2.0]),
        "seed": st.integers(0, 9),
        "top_k": st.sampled_from([0, 5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "no_repeat_ngram_size": st.sampled_from([0, 2, 5]),
        "stop": st.sampled_from([(), ("e ",), ("in", "x")]),
        "max_new_tokens": st.integers(1, 40),
    }
)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(text=st.sampled_from(TEXTS), asked=ASKED)
def test_guesses_change_nothing(slm: tuple[SLM, Told], text: str, asked: dict[str, Any]) -> None:
    """Greedy and sampled, with every promise that looks at the tokens so far."""
    plain, guessed = both(slm, text, **asked)
    assert same(plain, guessed)
    assert plain.stats.guessed_tokens == 0


def test_right_guesses_take_no_step(slm: tuple[SLM, Told]) -> None:
    plain, guessed = both(slm, TEXTS[0], no_repeat_ngram_size=0, max_new_tokens=60)
    assert same(plain, guessed)
    assert 10 < guessed.stats.guessed_tokens < guessed.stats.new_tokens


def test_a_batch_is_its_single_runs(slm: tuple[SLM, Told]) -> None:
    model, told = slm
    told.answer = ()
    requests = [Request(TEXTS[i % 3], words=2 + i, max_new_tokens=30) for i in range(5)]
    alone = [model.generate(r.request, words=r.words, max_new_tokens=30) for r in requests]
    assert all(map(same, model.generate_batch(requests, 4), alone))


def test_up_to_the_last_position(slm: tuple[SLM, Told]) -> None:
    ends = set()
    for seed in range(6):
        asked = {"temperature": 1.5, "seed": seed, "no_repeat_ngram_size": 0}
        plain, guessed = both(slm, "word " * 32, **asked)
        assert same(plain, guessed)
        ends.add(guessed.finish_reason)
    assert "context" in ends


@pytest.mark.parametrize("engine", ["onnxruntime", "ctranslate2"])
def test_engines_that_would_round_otherwise_guess_nothing(tiny_bundle: Path, engine: str) -> None:
    asked = {"max_new_tokens": 20, "no_repeat_ngram_size": 0}
    with load(tiny_bundle, engine, "int8", threads=1, speculate=True) as theirs:
        for _ in range(3):
            assert theirs.generate(TEXTS[0], **asked).stats.guessed_tokens == 0


def test_it_learns_while_it_answers(tiny_bundle: Path) -> None:
    with load(tiny_bundle, "numba", "int8", threads=1, speculate=True) as slm:
        answers = [slm.generate(TEXTS[0], words=12, relevance=i % 3) for i in range(12)]
        assert answers[0].stats.guessed_tokens == 0
        assert answers[-1].stats.guessed_tokens > 0
        assert answers[0].token_ids == answers[3].token_ids == answers[9].token_ids


# -- the table -------------------------------------------------------------------


def test_it_guesses_what_followed() -> None:
    ngrams = NGrams()
    line = [5, 6, 7, 8, 9, 5, 6, 1, 2, 3]
    assert ngrams.guess(line, 3) == []
    for _ in range(20):
        ngrams.learn_all(line)
    assert ngrams.guess([5, 6, 7], 3) == [8, 9, 5]
    assert ngrams.guess([9, 5, 6], 2) == [1, 2]
    assert ngrams.guess([7], 1) == [8]


def test_the_majority_wins_and_is_forgotten_when_it_ends() -> None:
    ngrams = NGrams()
    for follower in [8] * 20 + [9] * 3:
        ngrams.learn([1, 2, 3], follower)
    assert ngrams.guess([1, 2, 3], 1) == [8]
    for _ in range(60):
        ngrams.learn([1, 2, 3], 9)
    assert ngrams.guess([1, 2, 3], 1) == [9]


def test_noise_is_not_worth_a_guess() -> None:
    ngrams = NGrams()
    noise = random.Random(1).choices(range(300), k=5000)
    ngrams.learn_all(noise)
    guesses = [ngrams.guess(noise[i : i + 3], 3) for i in range(0, 4000, 10)]
    assert sum(map(len, guesses)) < 40


@given(st.lists(st.integers(0, 50), max_size=200), st.integers(0, 4))
def test_any_tokens_are_fine(ids: list[int], most: int) -> None:
    ngrams = NGrams()
    ngrams.learn_all(ids)
    guess = ngrams.guess(ids, most)
    assert len(guess) <= most
    assert set(guess) <= set(ids)
