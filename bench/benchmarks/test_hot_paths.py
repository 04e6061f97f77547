"""Where the time of an answer goes, on the shipped bundle; `make bench` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import edge_slm
from edge_slm import SLM, Request
from edge_slm_bench.measure import request_of
from edge_slm_runtime import read_manifest
from edge_slm_runtime.sampling import Sampler, Sampling

Benchmark = Any  # pytest-benchmark's fixture is not typed
LONGEST = 160  # words; the length promise keeps an answer from ending early


@pytest.fixture(scope="module", params=["onnxruntime", "ctranslate2"])
def slm(request: pytest.FixtureRequest) -> Iterator[SLM]:
    bundle = edge_slm.shipped_bundle()
    if request.param not in {v.engine for v in read_manifest(bundle).variants}:
        pytest.skip(f"the shipped bundle has no {request.param} variant")
    with edge_slm.load(bundle, engine=request.param) as loaded:
        yield loaded


def prompt(slm: SLM, tokens: int) -> str:
    return request_of(tokens, lambda text: len(slm.check(Request(text)).prompt))


def test_load(benchmark: Benchmark) -> None:
    benchmark(lambda: edge_slm.load().close())


def test_tokenise(benchmark: Benchmark, slm: SLM) -> None:
    request = Request(prompt(slm, 64), words=24)
    benchmark(lambda: slm.check(request))


@pytest.mark.parametrize("tokens", [16, 64, 192])
def test_prefill(benchmark: Benchmark, slm: SLM, tokens: int) -> None:
    text = prompt(slm, tokens)
    benchmark(lambda: slm.generate(text, max_new_tokens=1))


def test_decode_32_tokens(benchmark: Benchmark, slm: SLM) -> None:
    text = prompt(slm, 16)
    benchmark(lambda: slm.generate(text, words=LONGEST, max_new_tokens=32))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.8), Sampling(temperature=0.8, top_k=40, top_p=0.9)],
    ids=["greedy", "temperature", "top-k and top-p"],
)
def test_sampler(benchmark: Benchmark, sampling: Sampling) -> None:
    logits = np.random.default_rng(0).standard_normal(6144).astype(np.float32)
    sampler = Sampler(sampling, prompt=range(64))
    benchmark(lambda: sampler.pick(logits.copy()))
