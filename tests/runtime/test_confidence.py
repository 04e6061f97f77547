"""The confidence of a model in its own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_slm_runtime import SLM, Request, load
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import ManifestInvalid
from edge_slm_runtime.ranking import score


@pytest.fixture(scope="module", params=[("onnxruntime", "fp32"), ("numba", "int8")], ids="-".join)
def judging(request: pytest.FixtureRequest, with_grammar: Callable[..., Path]) -> Iterator[SLM]:
    with load(with_grammar(confidence=True), *request.param, 1) as slm:
        yield slm


def expected(slm: SLM, request: str, text: str, **command: object) -> float:
    """The probability of the highest level after the text and the end token."""
    plan = slm.check(Request.of(request, logprobs=True, **command))
    logits = slm.logits([*plan.prompt, *slm._codec.encode(text), slm._codec.ends[0]])[-1]
    of_levels = logits[[*plan.levels]].astype(np.float64)
    chances = np.exp(of_levels - of_levels.max())
    return float(chances[-1] / chances.sum())


@pytest.mark.parametrize("words", [None, 3, 8])
def test_it_is_that_of_the_highest_level_behind_the_end(judging: SLM, words: int | None) -> None:
    command = {"task": "image", "words": words, "max_new_tokens": 60}
    texts = ["a wet dog", "two cats", "tree in the snow", "red fox"]
    for found in judging.generate_batch(texts, logprobs=True, **command):
        again = expected(judging, found.request, found.text, **command)
        ids = judging._codec.encode(found.text)
        if [*found.token_ids[: len(ids)]] == ids:  # else the model wrote it with other tokens
            assert found.confidence == pytest.approx(again, rel=2e-3)
        assert 0 < found.confidence < 1
        assert found.score is not None
        assert len(found.logprobs) == len(found.token_ids)


def test_the_answer_is_the_same_with_it(judging: SLM) -> None:
    command = {"task": "image", "words": 8, "max_new_tokens": 60}
    plain = judging.generate("a wet dog", **command)
    judged = judging.generate("a wet dog", **command, logprobs=True)
    assert plain.confidence is None
    assert (plain.text, plain.token_ids) == (judged.text, judged.token_ids)
    assert plain.finish_reason == judged.finish_reason
    full = judging.generate("a wet dog", task="image", logprobs=True)  # to the end of the context
    assert full.finish_reason in ("stop", "context")
    assert full.confidence is not None
    stopped = judging.generate("a wet dog", **command, logprobs=True, stop=full.text[3:5])
    assert stopped.confidence is not None


def test_of_several_answers_it_counts(judging: SLM) -> None:
    several = judging.variations("a wet dog", 4, task="image", words=8, max_new_tokens=60)
    assert all(one.confidence is not None for one in several)
    best = judging.generate("a wet dog", task="image", words=8, max_new_tokens=60, best_of=4)
    assert best.confidence is not None
    low, high = (score([-1.0], "a", "a", confidence=value) for value in (0.2, 0.4))
    assert high - low == pytest.approx(4 * np.log(2))
    assert score([-1.0], "a", "a") == score([-1.0], "a", "a", confidence=1.0)
    assert np.isfinite(score([-1.0], "a", "a", confidence=0.0))


def test_a_deadline_ends_it(judging: SLM) -> None:
    late = judging.generate("a wet dog", task="image", logprobs=True, deadline_ms=0.01)
    assert late.finish_reason == "deadline"
    assert late.confidence is None


def test_a_grammar_says_so_or_not(schema: CommandSchema) -> None:
    assert not schema.confidence
    data = schema.to_json()
    assert "confidence" not in data
    assert CommandSchema.from_json(data | {"confidence": True}).to_json()["confidence"] is True
    for wrong in ({"confidence": 1}, {"restated": ["nothing"]}):
        with pytest.raises(ManifestInvalid, match=next(iter(wrong))):
            CommandSchema.from_json(data | wrong)
