from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_slm_runtime import SLM, Request, load
from edge_slm_runtime.errors import BadSetting, NotSupportedByEngine
from edge_slm_runtime.keywords import repeated_share
from edge_slm_runtime.ranking import score

ASKED = Request("a red fox in the snow", max_new_tokens=12)


def test_the_score_is_likelihood_and_coverage_less_faults() -> None:
    assert score((-1.0, -2.0), "a red fox", "the foxes") == -1.5 + 0.5
    assert score((), "a red fox", "") == 0
    assert math.isclose(score((-0.5,), "it is", "x"), 0.5)
    assert math.isclose(score((), "fox", "a fox, a sleek fur, sleek"), 1 - 1.5 / 4)
    assert score((), "fox", "a fox", torn=True) == 1 - 0.4
    assert score((), "fox", 'a fox with "FOX"') == 1 - 0.6
    assert score((), "fox", 'a fox with "FOX"', shows_text=True) == 1
    assert score((), 'a "fox"', 'a "fox"') == 1


def test_words_of_the_request_may_come_again() -> None:
    assert repeated_share("a sleek fox", "The sleek fox, a sleek animal with eyes") == 0
    assert repeated_share("a fox", "running foxes run, run") == 2 / 4
    assert repeated_share("a fox", "") == 0


def test_the_best_of_several_is_the_one_of_the_highest_score(stepped_slm: SLM) -> None:
    best = stepped_slm.generate(ASKED, best_of=5)
    tries = [replace(ASKED, temperature=0.5, seed=seed) for seed in range(1, 5)]
    all_five = list(stepped_slm.generate_batch([ASKED, *tries], 5, logprobs=True))
    ranked = max(all_five, key=lambda one: one.score or 0.0)
    if stepped_slm.variant.name != "onnx-int4":  # whose kernels round by the batch
        assert (best.text, best.seed, best.score) == (ranked.text, ranked.seed, ranked.score)
        assert stepped_slm.generate(ASKED, best_of=5).text == best.text  # no seed is needed
    assert best.warnings == ()


def test_seeds_and_temperature_are_kept(stepped_slm: SLM) -> None:
    best = stepped_slm.generate(ASKED, best_of=3, temperature=1.0, seed=7)
    assert best.seed in (7, 8, 9)
    assert stepped_slm.generate(ASKED, best_of=2, seed=3).seed in (None, 4)
    fresh = {stepped_slm.generate(ASKED, best_of=2, temperature=1.0).seed for _ in range(3)}
    assert len(fresh) == 3


def test_a_batch_has_the_best_of_each_request(stepped_slm: SLM) -> None:
    asked = [ASKED, replace(ASKED, best_of=3), replace(ASKED, request="a dog", best_of=2)]
    together = [one.text for one in stepped_slm.generate_batch(iter(asked), 2)]
    assert len(together) == 3
    if stepped_slm.variant.name != "onnx-int4":
        assert together == [stepped_slm.generate(one).text for one in asked]


def test_variations_are_the_best_of_more(stepped_slm: SLM) -> None:
    hot = replace(ASKED, temperature=1.0, seed=5)
    if stepped_slm.variant.name == "onnx-int4":
        pytest.skip("rounds by the batch")
    all_six = stepped_slm.variations(hot, n=6)
    two = stepped_slm.variations(hot, n=2, best_of=6)
    assert [one.text for one in two] == [one.text for one in all_six[:2]]


def test_what_cannot_be_chosen_is_said(tiny_bundle: Path) -> None:
    with load(tiny_bundle, "onnxruntime", "int8", threads=1) as slm:
        for bad in (0, 65, 1.5, True):
            with pytest.raises(BadSetting, match="best_of is"):
                slm.generate("a fox", best_of=bad)
        with pytest.raises(BadSetting, match="one answer as it comes"):
            slm.stream("a fox", best_of=2)
        with slm.session() as session, pytest.raises(BadSetting, match="as it comes"):
            session.submit("a fox", best_of=2)
        assert slm.generate("a fox", best_of=np.int64(1), max_new_tokens=2).score is None


def test_an_engine_that_reports_no_likelihood_chooses_nothing(slm: SLM) -> None:
    if slm.variant.engine == "ctranslate2":
        with pytest.raises(NotSupportedByEngine, match="cannot report logprobs"):
            slm.generate("a fox", best_of=2)
