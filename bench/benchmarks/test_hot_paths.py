"""Where the time of an answer goes, on the reference model in int8; `make bench` runs it.

One thread each, so that no thread waits for another one's core: what changes is the
code, not the machine. How speed grows with threads is what `edge-slm bench` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

import edge_slm
from edge_slm import SLM, Request
from edge_slm_bench.metrics.examples import Example
from edge_slm_bench.paired import (
    CLOCK,
    Kernel,
    Paired,
    compute_kernel,
    interpreter_kernel,
    memory_kernel,
)
from edge_slm_bench.prompts import request_of
from edge_slm_converters import convert
from edge_slm_runtime import read_manifest
from edge_slm_runtime.answer import Answer
from edge_slm_runtime.command import Command
from edge_slm_runtime.lexicon import KnownWords, words_in
from edge_slm_runtime.plan import Plan
from edge_slm_runtime.sampling import Sampler, Sampling
from edge_slm_runtime.text import TextCodec

pytestmark = pytest.mark.benchmark(timer=CLOCK)
LONGEST = 160  # words; the length promise keeps an answer from ending early
SENTENCE = (
    "an old fisherman mends his nets on the pier at dawn, warm light on weathered hands, gulls "
    "above the harbour, a small boat with peeling blue paint, soft mist over the water, film grain"
)
REFERENCE = Path(__file__).parents[2] / "models/reference"


@pytest.fixture(scope="session")
def compute() -> Kernel:
    return compute_kernel()


@pytest.fixture(scope="session")
def memory() -> Kernel:
    return memory_kernel()


@pytest.fixture(scope="session")
def interpreter() -> Kernel:
    return interpreter_kernel()


@pytest.fixture(scope="session", params=["onnxruntime", "numba"])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., SLM]:
    """`load` of the shipped bundle, or of the same model for our own kernels."""
    if request.param == "onnxruntime":
        return partial(edge_slm.load, threads=1)
    bundle = tmp_path_factory.mktemp("bundle") / "numba"
    short = Example("a red fox", Command("image", 7, 9), "a red fox in the snow at dusk")
    convert(REFERENCE, bundle, ["numba-int8"], evaluation=[short] * 2, accept=True)
    return partial(edge_slm.load, bundle, engine="numba", threads=1)


@pytest.fixture(scope="session")
def slm(opened: Callable[..., SLM]) -> Iterator[SLM]:
    # The same prompts again and again: computed whole, without the cache of earlier ones.
    with opened(prefix_cache_mb=0) as loaded:
        yield loaded


def prompt(slm: SLM, tokens: int, turn: int = 0) -> str:
    return request_of(tokens, lambda text: len(slm.check(Request(text)).prompt), turn)


def test_load(paired: Paired, compute: Kernel, opened: Callable[..., SLM]) -> None:
    paired(lambda: opened().close(), compute)


def test_tokenise(paired: Paired, interpreter: Kernel, slm: SLM) -> None:
    request = Request(prompt(slm, 64), words=24)
    paired(lambda: slm.check(request), interpreter)


@pytest.mark.parametrize("tokens", [16, 64, 192])
def test_prefill(paired: Paired, compute: Kernel, slm: SLM, tokens: int) -> None:
    text = prompt(slm, tokens)
    paired(lambda: slm.generate(text, max_new_tokens=1), compute)


def test_prefill_of_192_under_another_command(
    paired: Paired, compute: Kernel, opened: Callable[..., SLM]
) -> None:
    """The request's keys and values are still there, from when it was asked for before."""
    with opened() as slm:
        text, words = prompt(slm, 192), cycle(range(8, 100, 8))
        paired(lambda: slm.generate(text, words=next(words), max_new_tokens=1), compute)


def test_decode_32_tokens(paired: Paired, memory: Kernel, slm: SLM) -> None:
    text = prompt(slm, 16)
    paired(lambda: slm.generate(text, words=LONGEST, max_new_tokens=32), memory)


def test_batch_of_8_by_16_tokens(paired: Paired, compute: Kernel, slm: SLM) -> None:
    requests = [
        Request(prompt(slm, 16, turn), words=LONGEST, max_new_tokens=16) for turn in range(8)
    ]
    paired(lambda: list(slm.generate_batch(requests, batch_size=8)), compute)


@pytest.mark.parametrize("vocabulary", [6144, 16384])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(no_repeat_ngram_size=0),
        Sampling(no_repeat_ngram_size=0, temperature=0.8, seed=1),
        Sampling(no_repeat_ngram_size=0, temperature=0.8, top_k=40, top_p=0.9, seed=1),
        Sampling(no_repeat_ngram_size=5),
    ],
    ids=["greedy", "temperature", "top-k and top-p", "n-gram block"],
)
def test_sampler_32_tokens(
    paired: Paired, interpreter: Kernel, sampling: Sampling, vocabulary: int
) -> None:
    # Seven rows over and over: a greedy answer repeats itself unless that is blocked.
    rows = np.random.default_rng(0).standard_normal((7, vocabulary)).astype(np.float32)

    def answer() -> None:
        sampler = Sampler(sampling, prompt=range(64))
        for i in range(32):
            sampler.pick(rows[i % 7].copy())

    paired(answer, interpreter)


@pytest.mark.parametrize("lexicon", [False, True], ids=["any words", "known words"])
def test_control_32_tokens(paired: Paired, interpreter: Kernel, lexicon: bool) -> None:
    """All that happens between the passes of the model, which has the words of a sentence in
    mind, and every eighth token one that would make a word that is not known."""
    shipped = edge_slm.shipped_bundle()
    codec = TextCodec(shipped / "tokenizer.json", read_manifest(shipped).prompt)
    command, tokens = Command(), codec.encode(SENTENCE)[:32]
    words = sorted({*words_in(SENTENCE), *(b"%06d" % i for i in range(30_000))})
    known = KnownWords(words, codec, ["a fisherman"]) if lexicon else None
    sampling = Sampling(no_repeat_ngram_size=0)
    plan = Plan("x", command, command, (), (1,), 99, "max_tokens", None, (), sampling, known=known)
    rows = np.random.default_rng(0).standard_normal((32, codec.size)).astype(np.float32)
    rows[range(32), tokens] = 20
    rows[::8, codec.encode("zq")] = 22

    logits = rows[0].copy()

    def answer() -> None:
        one = Answer(plan, codec, 0.0)
        for row in rows:
            logits[:] = row
            one.accept(one.choose(logits))

    paired(answer, interpreter)
