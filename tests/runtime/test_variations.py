from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_slm_runtime import SLM, Request, load
from edge_slm_runtime.errors import BadSetting, NotSupportedByEngine, RequestTooLong
from edge_slm_runtime.ranking import score

ASKED = Request("a red fox in the snow", max_new_tokens=12, temperature=1.0, seed=5)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5, "ban": ["a", "e", "i"]}])
def test_logprobs_are_those_of_the_model(stepped_slm: SLM, settings: dict[str, object]) -> None:
    out = stepped_slm.generate(ASKED, logprobs=True, **settings)
    assert stepped_slm.generate(ASKED, **settings).token_ids == out.token_ids
    prompt = stepped_slm.check(ASKED).prompt
    rows = stepped_slm.logits((*prompt, *out.token_ids))[len(prompt) - 1 : -1].astype(np.float64)
    norms = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
    expected = rows[range(len(rows)), out.token_ids] - norms
    assert out.logprobs is not None
    assert len(out.logprobs) == len(out.token_ids)
    # Prompts and steps differ by the order of sums, in onnxruntime's int4 by its rounding.
    atol = 0.5 if stepped_slm.variant.name == "onnx-int4" else 0.01
    np.testing.assert_allclose(out.logprobs, expected, atol=atol)
    assert out.score == pytest.approx(score(out.logprobs, ASKED.request, out.text))
    assert out.as_dict()["logprobs"] == list(out.logprobs)


def test_nothing_is_recorded_unasked(slm: SLM) -> None:
    out = slm.generate("a fox", max_new_tokens=3)
    assert (out.logprobs, out.score) == (None, None)
    if slm.variant.engine == "ctranslate2":
        with pytest.raises(NotSupportedByEngine, match="cannot report logprobs"):
            slm.generate("a fox", logprobs=True)
        with pytest.raises(NotSupportedByEngine):
            slm.variations("a fox")


def test_variations_are_distinct_ranked_and_share_the_prompt(stepped_slm: SLM) -> None:
    stepped_slm.trim_memory()
    found = stepped_slm.variations(ASKED, n=4)
    assert len({one.text for one in found}) == 4
    scores = [one.score for one in found if one.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert sorted(one.seed or 0 for one in found) == [5, 6, 7, 8]
    assert sum(one.stats.cached_tokens > 0 for one in found) >= 3
    alone = stepped_slm.generate(ASKED, seed=found[1].seed)
    if stepped_slm.variant.name != "onnx-int4":  # whose kernels round by the batch
        assert alone.text == found[1].text
    (one,) = stepped_slm.variations(ASKED, n=np.int64(1))  # type: ignore[arg-type]
    assert one.seed == 5


def test_what_cannot_be_drawn_is_said(tiny_bundle: Path) -> None:
    with load(tiny_bundle, "onnxruntime", "int8", threads=1, prefix_cache_mb=0) as slm:
        greedy = slm.variations("a fox", 2, max_new_tokens=8)
        assert all("drawn at 0.8" in one.warnings[-1] for one in greedy)
        same = slm.variations(ASKED, 3, top_k=1)
        assert [one.warnings for one in same] == [("1 of 7 answers drawn were distinct",)]
        for bad in (0, 65, 1.5, True):
            with pytest.raises(BadSetting, match="n is"):
                slm.variations("a fox", bad)  # type: ignore[arg-type]
        with pytest.raises(RequestTooLong, match=r"^the prompt"):
            slm.variations(ASKED, max_new_tokens=1000)
