"""Banned and kept words, prompt syntax, lengths and sampling in one answer; in batches; guessed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_slm_runtime import SLM, Request, load
from edge_slm_runtime.errors import EdgeSlmError

from .test_bans import holds
from .test_keeps import has
from .test_lexicon import file_of, with_lexicon, words_of_tokens

WORDS = "a in the snow e s n , . F ion gen ji half 36".split()
PHRASES = ("golden hour", "35mm", "the fox", "n x")
CONSTRUCTS = ("(cabin:1.2)", "[the|a]", "<lora:x:1>", "--ar 1:2")
REQUESTS = ("a red fox", f"a {' snow '.join(CONSTRUCTS)}", "neon street in the rain")


def drawn(rng: random.Random) -> Request:
    settings: dict[str, Any] = {
        "task": rng.choice([None, "image", "title"]),
        "words": rng.choice([None, 3, 10, 14]),
        "temperature": rng.choice([0, 0, 1.3]),
        "seed": rng.randrange(9),
        "ban": rng.sample(WORDS, rng.randint(0, 6)),
        "keep": rng.sample(PHRASES, rng.randint(0, 2)),
        "max_new_tokens": rng.choice([40, 60]),
        "logprobs": rng.random() < 0.3,
        "no_repeat_ngram_size": rng.choice([0, 2, 5]),
        "repetition_penalty": rng.choice([1, 1, 1.3]),
    }
    return Request(rng.choice(REQUESTS), **settings)


def can_be_asked(slm: SLM, request: Request) -> bool:
    try:
        slm.check(request)
    except EdgeSlmError:
        return False
    return True


@pytest.mark.parametrize("lexicon", [False, True])
@pytest.mark.parametrize("judged", [False, True])
def test_all_promises_hold_at_once(
    tiny_bundle: Path,
    with_grammar: Callable[..., Path],
    tmp_path: Path,
    lexicon: bool,
    judged: bool,
) -> None:
    rng, bundle = random.Random(11), tiny_bundle
    if judged:
        bundle = with_grammar(restated=("image",), confidence=True)
    if lexicon:
        words = file_of(words_of_tokens(tiny_bundle))
        bundle = with_lexicon(bundle, tmp_path / "bundle", words)
    with (
        load(bundle, "numba", "int8", threads=1) as slm,
        load(bundle, "numba", "int8", threads=1, speculate=True) as guessing,
    ):
        asked = [one for one in (drawn(rng) for _ in range(90)) if can_be_asked(slm, one)]
        assert len(asked) > 60
        for one, out in zip(asked, slm.generate_batch(asked, batch_size=3), strict=True):
            stream = guessing.stream(one)
            assert "".join(stream) == stream.result.text == out.text
            assert stream.result.token_ids == out.token_ids
            whole = out.finish_reason in ("stop", "length")
            assert out.in_tolerance is not False or not whole
            assert one.logprobs == (out.logprobs is not None)
            assert (one.logprobs and judged) == (out.confidence is not None)
            if one.request == REQUESTS[1]:
                assert [out.text.count(construct) for construct in CONSTRUCTS] == [1, 1, 1, 1]
                continue
            assert not [word for word in one.ban if holds(out.text, word)]
            assert not whole or all(has(out.text, phrase) for phrase in one.keep)
