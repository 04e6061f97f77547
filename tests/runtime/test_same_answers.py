"""An answer is the same however it is computed: whole or in parts, remembered, beside others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_slm_runtime import SLM, Generation, Request, load

from .conftest import STEPPED

REQUESTS = (
    "a cosy cabin in the snow",
    "a cosy cabin in the snow, warm light",
    "neon street in the rain, reflections " * 3,
    "misty forest",
)
ASKED = st.builds(
    Request,
    st.sampled_from(REQUESTS),
    words=st.sampled_from([None, 3, 8]),
    temperature=st.sampled_from([0.0, 0.0, 1.2]),
    top_k=st.sampled_from([0, 7]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 5),
    max_new_tokens=st.integers(1, 16),
)


@pytest.fixture(scope="module", params=STEPPED, ids="-".join)
def slms(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[dict[str, SLM]]:
    """The same variant without anything that saves time, with a prefix cache, and guessing."""
    how: dict[str, dict[str, Any]] = {
        "plain": {"prefix_cache_mb": 0},
        "kept": {"prefix_cache_mb": 0.5},
        "guessing": {"speculate": True},  # numba does
    }
    found = {
        name: load(tiny_bundle, *request.param, threads=1, **options)
        for name, options in how.items()
    }
    yield found
    for slm in found.values():
        slm.close()


def told(answers: Iterator[Generation]) -> list[tuple[Any, ...]]:
    return [(a.text, a.token_ids, a.finish_reason, a.seed) for a in answers]


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(ASKED, min_size=2, max_size=6), rows=st.integers(2, 5))
def test_batches_and_remembered_prompts(
    slms: dict[str, SLM], asked: list[Request], rows: int
) -> None:
    alone = told(slms["plain"].generate_batch(asked, 1))
    assert told(slms["kept"].generate_batch(asked, 1)) == alone
    if slms["plain"].variant.name != "onnx-int4":  # it rounds a lone row otherwise than several
        assert told(slms["plain"].generate_batch(asked, rows)) == alone
        assert told(slms["kept"].generate_batch(asked, rows)) == alone


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(ASKED, min_size=1, max_size=3), most=st.integers(4, 40))
def test_prompts_in_parts(slms: dict[str, SLM], asked: list[Request], most: int) -> None:
    alone = told(slms["plain"].generate_batch(asked, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slms["plain"]._engine, "prefill_tokens", most)
        assert told(slms["plain"].generate_batch(asked, 1)) == alone


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(ASKED, min_size=1, max_size=4))
def test_guesses(slms: dict[str, SLM], asked: list[Request]) -> None:
    """The same requests again and again, so that there is something to guess."""
    alone = told(slms["plain"].generate_batch(asked, 1))
    for _ in range(3):
        assert told(slms["guessing"].generate_batch(asked, 1)) == alone
