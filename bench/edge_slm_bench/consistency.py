"""Ways of decoding that must not change a greedy answer: in a batch, after a cached prefix,
with the prompt in parts, with guessed tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edge_slm_bench.process import launch
from edge_slm_bench.runners import Spec
from edge_slm_bench.runners.edge_slm import long_words
from edge_slm_runtime.engines import engine_class
from edge_slm_runtime.prompt import PromptForm

_PLAIN = {"prefix_cache_mb": 0}  # one request after the other, nothing kept of the one before
_BATCHES = (8, 32)
_PREFILL = 8  # tokens; of the chunks


def plain_answers(spec: Spec, requests: Sequence[Mapping[str, Any]], threads: int) -> Any:
    """`Generation.as_dict` of each of `requests` (`Request`'s arguments)."""
    return _answers(replace(spec, options=_PLAIN), requests, threads)


def count_mismatches(
    form: PromptForm,
    spec: Spec,
    requests: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]],
    threads: int,
) -> dict[str, int]:
    """Way → how many answers to `requests` have other tokens than `plain` ones; only ways
    that the variant has. Raises EdgeSlmError."""
    mismatches = {}

    def count(way: str, answers: Sequence[Mapping[str, Any]]) -> None:
        pairs = zip(plain, answers, strict=True)
        mismatches[way] = sum(a["token_ids"] != b["token_ids"] for a, b in pairs)

    alone = replace(spec, options=_PLAIN)
    for batch in _BATCHES:
        count(f"batch {batch}", _answers(alone, requests, threads, batch=batch))
    if not engine_class(spec.engine).prefix_cache:
        return mismatches
    # Each request under another command first: all but the command is then cached.
    other = {"words": long_words(form)[0], "max_new_tokens": 1}
    twice = [asked for request in requests for asked in ({**request, **other}, request)]
    count("prefix cache", _answers(spec, twice, threads)[1::2])
    in_chunks = replace(spec, options={**_PLAIN, "prefill_tokens": _PREFILL})
    count(f"chunks of {_PREFILL}", _answers(in_chunks, requests, threads))
    if engine_class(spec.engine).guesses:
        guessing = replace(spec, options={**_PLAIN, "speculate": True})
        count("speculation", _answers(guessing, requests, threads))
    return mismatches


def _answers(
    spec: Spec, requests: Sequence[Mapping[str, Any]], threads: int, **more: int
) -> list[dict[str, Any]]:
    job = {"kind": "answers", "spec": spec.as_dict(), "threads": threads, "requests": requests}
    (answers,) = launch({**job, **more})["answers"]
    return list(answers)
