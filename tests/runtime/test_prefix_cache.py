"""A prompt that begins like an earlier one is computed only from there on, with the same result."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_slm_runtime import SLM, Request, load
from edge_slm_runtime.answer import Answer
from edge_slm_runtime.engines.kv_cache import KVCache, PrefixCache
from edge_slm_runtime.engines.stepping import SteppingEngine
from edge_slm_runtime.errors import BadSetting, EmptyRequest, OutOfMemory

from .conftest import STEPPED

PREAMBLE = "a cosy cabin in the snow, warm light in the windows"
TEXTS = (PREAMBLE, PREAMBLE + ", soft evening sky", "neon street in the rain", "a misty forest")
POSITION = 2 * mmap.PAGESIZE  # a page of keys and one of values
SHAPE = (2, 1, 1, 16, mmap.PAGESIZE // 4)
KIND = np.float32


@pytest.fixture(scope="module", params=STEPPED, ids="-".join)
def pair(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[tuple[SLM, SLM]]:
    """The same variant with and without a prefix cache."""
    with (
        load(tiny_bundle, *request.param, threads=1) as kept,
        load(tiny_bundle, *request.param, threads=1, prefix_cache_mb=0) as fresh,
    ):
        yield kept, fresh


def prompt_logits(slm: SLM, prompt: list[int]) -> Any:
    """Logits after a prompt, computed as for an answer; and the tokens reused."""
    engine = slm._engine
    assert isinstance(engine, SteppingEngine)
    cache = engine._prefixes.checkout(prompt)
    plan = slm.check(Request("a cat"))
    answer = Answer(replace(plan, prompt=tuple(prompt)), slm._codec, perf_counter())
    *_, [filled] = engine._prefill(cache, 0, answer)
    assert filled.scores is not None
    logits = filled.scores.copy()
    engine._prefixes.checkin(cache, len(prompt))
    return logits, answer.cached


def most_known(prompt: int) -> int:
    """All but the last two or three tokens: kernels take rows in pairs."""
    return (prompt - 2) // 2 * 2


def test_same_request_other_command(pair: tuple[SLM, SLM]) -> None:
    kept, fresh = pair
    for text in (*TEXTS, TEXTS[0]):
        for words, seed in ((5, None), (9, 3), (5, None)):
            asked: dict[str, Any] = {"words": words, "max_new_tokens": 30}
            if seed:
                asked |= {"temperature": 1.2, "seed": seed}
            a, b = kept.generate(text, **asked), fresh.generate(text, **asked)
            assert (a.token_ids, a.text, a.seed) == (b.token_ids, b.text, b.seed)
            assert b.stats.cached_tokens == 0
    again = kept.generate(TEXTS[0], words=3, max_new_tokens=5)
    assert again.stats.prompt_tokens - 6 < again.stats.cached_tokens < again.stats.prompt_tokens


def test_rows_of_a_batch_share_too(pair: tuple[SLM, SLM]) -> None:
    kept, _ = pair
    requests = [
        Request(TEXTS[i % 2], words=1 + i, max_new_tokens=8 + 5 * (i % 3)) for i in range(9)
    ]
    alone = [
        kept.generate(r.request, words=r.words, max_new_tokens=r.max_new_tokens) for r in requests
    ]
    batch = list(kept.generate_batch(requests, 3))
    assert [b.token_ids for b in batch] == [a.token_ids for a in alone]
    assert batch[0].stats.cached_tokens == 0
    assert all(b.stats.cached_tokens > 10 for b in batch[1:])


def test_candidates_of_one_request(pair: tuple[SLM, SLM]) -> None:
    asked = [Request(PREAMBLE, temperature=1.5, seed=s, max_new_tokens=12) for s in range(4)]
    for batch_size in (1, 4):
        a, b = (list(slm.generate_batch(asked, batch_size)) for slm in pair)
        assert [x.token_ids for x in a] == [x.token_ids for x in b]
        assert all(x.stats.cached_tokens == most_known(x.stats.prompt_tokens) for x in a[1:])


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    prompts=st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(1, 60), st.lists(st.integers(60, 399), max_size=9)
        ),
        min_size=2,
        max_size=6,
    )
)
def test_logits_are_those_of_the_whole_prompt(
    pair: tuple[SLM, SLM], prompts: list[tuple[int, int, list[int]]]
) -> None:
    """Bit by bit."""
    kept, fresh = pair
    heads = np.random.default_rng(5).integers(60, 400, (4, 60)).tolist()
    for head, length, tail in prompts:
        prompt = heads[head][:length] + tail
        got, cached = prompt_logits(kept, prompt)
        whole, none = prompt_logits(fresh, prompt)
        assert none == 0
        assert cached <= max(len(prompt) - 2, 0)
        assert np.array_equal(got, whole)


def test_a_long_prompt_is_computed_in_parts(
    pair: tuple[SLM, SLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fresh = pair
    prompt = np.random.default_rng(1).integers(60, 400, 100).tolist()
    whole, _ = prompt_logits(fresh, prompt)
    for most in (7, 33, 99):
        monkeypatch.setattr(fresh._engine, "prefill_tokens", most)
        parts, _ = prompt_logits(fresh, prompt)
        assert np.array_equal(parts, whole)


def test_a_prompt_of_one_token(pair: tuple[SLM, SLM]) -> None:
    kept, fresh = pair
    prompt_logits(kept, [70, 71, 72, 73, 74, 75])
    got, cached = prompt_logits(kept, [70])
    whole, _ = prompt_logits(fresh, [70])
    assert cached == 0
    assert np.array_equal(got, whole)


def test_threads_share_prefixes(pair: tuple[SLM, SLM]) -> None:
    kept, fresh = pair
    texts = [TEXTS[i % 4] for i in range(24)]
    alone = [fresh.generate(text, max_new_tokens=15).token_ids for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda t: kept.generate(t, max_new_tokens=15).token_ids, texts))
    assert found == alone


def test_an_abandoned_stream_leaves_a_sound_prefix(pair: tuple[SLM, SLM]) -> None:
    kept, fresh = pair
    stream = kept.stream(PREAMBLE + " again", max_new_tokens=30)
    next(stream)
    stream.close()
    a = kept.generate(PREAMBLE + " again", max_new_tokens=30)
    assert a.stats.cached_tokens == most_known(a.stats.prompt_tokens)
    assert a.token_ids == fresh.generate(PREAMBLE + " again", max_new_tokens=30).token_ids


def test_a_bad_request_in_a_batch_leaves_a_sound_prefix(pair: tuple[SLM, SLM]) -> None:
    kept, fresh = pair
    asked = [Request(PREAMBLE + " twice", max_new_tokens=9), Request("")]
    with pytest.raises(EmptyRequest):
        list(kept.generate_batch(asked, 1))
    a, b = (next(slm.generate_batch(asked, 1)) for slm in pair)
    assert a.stats.cached_tokens == most_known(a.stats.prompt_tokens)
    assert (
        a.token_ids == b.token_ids == fresh.generate(asked[0].request, max_new_tokens=9).token_ids
    )


def test_trimmed_memory_is_computed_anew(pair: tuple[SLM, SLM]) -> None:
    slm, fresh = pair
    asked = Request("a small boat crossing a lake at dawn", max_new_tokens=8)
    slm.generate(asked)
    assert slm.generate(asked).stats.cached_tokens
    stream = slm.stream(asked)
    next(stream)
    slm.trim_memory()
    list(stream)
    slm.trim_memory()
    again = slm.generate(asked)
    assert again.stats.cached_tokens == 0
    assert again.token_ids == stream.result.token_ids == fresh.generate(asked).token_ids


def test_callers_of_another_key_share_nothing(pair: tuple[SLM, SLM]) -> None:
    kept, fresh = pair
    text = PREAMBLE + " of mine"
    expected = fresh.generate(text, max_new_tokens=9).token_ids
    for key, known in (("a", False), ("b", False), ("a", True), ("b", True)):
        found = kept.generate(text, max_new_tokens=9, cache_key=key)
        assert found.token_ids == expected
        assert found.stats.cached_tokens == (known and most_known(found.stats.prompt_tokens))
    with pytest.raises(BadSetting, match="cache_key is 7"):
        kept.generate(text, cache_key=7)


@pytest.mark.parametrize("size", [-1, float("nan"), float("inf"), True, "16"])
def test_size_of_the_prefix_cache_is_checked(tiny_bundle: Path, size: Any) -> None:
    with pytest.raises(BadSetting, match="prefix_cache_mb"):
        load(tiny_bundle, prefix_cache_mb=size)


# -- what is kept ---------------------------------------------------------------


def used(prefix_cache: PrefixCache, prompt: list[int], positions: int = 0) -> int:
    """An answer to `prompt`; how many of its tokens were known."""
    cache = prefix_cache.checkout(prompt)
    known = cache.begin(0, prompt)
    cache.prompts[0] = tuple(prompt)
    prefix_cache.checkin(cache, positions or len(prompt))
    return known


def test_the_longest_unused_goes_first() -> None:
    prefix_cache = PrefixCache(SHAPE, 3 * 8 * POSITION, KIND)  # three prompts of 8
    a, b, c, d = ([token] * 8 for token in range(4))
    for prompt in (a, b, c, a, d):  # d takes the place of b
        used(prefix_cache, prompt)
    assert [used(prefix_cache, p) for p in (a, c, d)] == [6, 6, 6]
    assert used(prefix_cache, b) == 0
    assert prefix_cache.bytes <= 3 * 8 * POSITION


def test_a_common_beginning_is_copied_while_there_is_room() -> None:
    prefix_cache = PrefixCache(SHAPE, 1 << 30, KIND)
    a, b = [1] * 5 + [2] * 9, [1] * 5 + [3] * 9
    assert [used(prefix_cache, p) for p in (a, b, a, b)] == [0, 4, 12, 12]


def test_three_tokens_in_common_are_not_worth_it() -> None:
    prefix_cache = PrefixCache(SHAPE, 1 << 30, KIND)
    assert [used(prefix_cache, p) for p in ([1, 1, 1, 2, 2], [1, 1, 1, 3, 3])] == [0, 0]


def test_the_last_one_is_kept_however_long() -> None:
    prefix_cache = PrefixCache(SHAPE, 8, KIND)
    assert [used(prefix_cache, [1] * 12) for _ in range(2)] == [0, 10]
    assert used(prefix_cache, [2] * 12) == 0
    assert prefix_cache.bytes == 12 * POSITION


def test_what_a_longer_answer_wrote_counts() -> None:
    prefix_cache = PrefixCache(SHAPE, 1 << 30, KIND)
    used(prefix_cache, [1] * 4, positions=16)
    used(prefix_cache, [1] * 4)
    assert prefix_cache.bytes == 16 * POSITION


def test_half_precision_takes_half_the_bytes() -> None:
    prefix_cache = PrefixCache(SHAPE, 1 << 30, np.float16)
    used(prefix_cache, [1] * 12)
    assert prefix_cache.bytes == 6 * POSITION
    assert used(prefix_cache, [1] * 12) == 10


def test_copying_from_a_cache_is_a_use_of_it() -> None:
    prefix_cache = PrefixCache(SHAPE, 28 * POSITION, KIND)
    a, b = [1] * 9, [2] * 9
    for prompt in (a, b, [1] * 4 + [3] * 4):  # the beginning of a is copied, so b goes
        used(prefix_cache, prompt)
    used(prefix_cache, [4] * 9)
    assert [cache.prompts[0][0] for cache in prefix_cache._kept].count(2) == 0


def test_nothing_is_kept_without_a_limit() -> None:
    prefix_cache = PrefixCache(SHAPE, 0, KIND)
    assert [used(prefix_cache, [1] * 12) for _ in range(2)] == [0, 0]
    assert prefix_cache.bytes == 0


@settings(deadline=None)
@given(
    limit=st.integers(0, 50 * POSITION),
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=16), max_size=30),
)
def test_what_is_known_is_true_and_bounded(limit: int, prompts: list[list[int]]) -> None:
    """Each position holds its token as if that were its key."""
    prefix_cache = PrefixCache(SHAPE, limit, KIND)
    for prompt in prompts:
        cache = prefix_cache.checkout(prompt)
        known = cache.begin(0, prompt)
        assert known <= max(len(prompt) - 2, 0)
        assert cache.array[0, 0, 0, :known, 0].tolist() == prompt[:known]
        cache.array[0, 0, 0, : len(prompt), 0] = prompt
        cache.prompts[0] = tuple(prompt)
        prefix_cache.checkin(cache, len(prompt))
        assert prefix_cache.bytes <= max(limit, POSITION * cache.written)
        assert cache.written >= len(prompt)


def test_memory_is_taken_as_positions_are_written() -> None:
    from edge_slm_bench.process import rss_mb

    before = rss_mb()
    cache = KVCache((2, 1, 64, 4096, 64), np.float32)  # 128 MiB
    assert before is not None
    assert (rss_mb() or 0) < before + 8
    cache.array[:, :, :, :16] = 1
    assert (rss_mb() or 0) < before + 8


def test_more_than_there_are_addresses() -> None:
    with pytest.raises(OutOfMemory, match="no memory for the cache of 2 answers"):
        KVCache((2, 2, 64, 10**18, 64), KIND)
