"""Our own runtime as it ships: tokenising, sampler, length promise and text included.

The longest words command keeps an answer from ending early, so the work per token is
that of a user's request and its amount is that of the peers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edge_slm_bench.runners.base import Float32, Prompt, Spec, TimedAnswer
from edge_slm_runtime import SLM, Request, load
from edge_slm_runtime.bundle import Variant
from edge_slm_runtime.errors import EngineError
from edge_slm_runtime.prompt import PromptForm

_LONG = 1000  # words


def spec_of(bundle: str | Path, variant: Variant) -> Spec:
    return Spec(
        runner="edge_slm",
        variant=variant.name,
        engine=variant.engine,
        precision=variant.precision,
        path=str(bundle),
        disk_bytes=variant.bytes,
        step_bytes=variant.weight_bytes_per_token,
        peer=False,
    )


def speculating(spec: Spec) -> Spec:
    """The same variant with guessed tokens: a row of its own."""
    return replace(spec, variant=f"{spec.variant}+speculation", options={"speculate": True})


def long_words(form: PromptForm) -> tuple[int, int]:
    """Lengths to ask for that a short answer never has, in words, the longest first: of a
    grammar, the last two kinds."""
    if form.schema is None:
        return _LONG, _LONG - 1
    edges = form.schema.axis("words").edges
    return edges[-1] - 1, edges[-2] - 1


def open(spec: Spec, threads: int) -> EdgeSlmRunner:  # noqa: A001
    return EdgeSlmRunner(load(spec.path, spec.engine, spec.precision, threads, **spec.options))


class EdgeSlmRunner:
    concurrent = True  # `SLM` may be called from several threads

    def __init__(self, slm: SLM) -> None:
        self.slm = slm

    def single(self, prompt: Prompt, new_tokens: int) -> TimedAnswer:
        trace = self.slm.trace(self._request(prompt, new_tokens))
        self._check(trace.prompt, prompt)
        return TimedAnswer(trace.ids, trace.seconds)

    def batch(self, prompts: Sequence[Prompt], new_tokens: int) -> list[tuple[int, ...]]:
        requests = [self._request(prompt, new_tokens) for prompt in prompts]
        return [g.token_ids for g in self.slm.generate_batch(requests, len(requests))]

    def logits(self, ids: Sequence[int]) -> Float32:
        return self.slm.logits(ids)

    def close(self) -> None:
        self.slm.close()

    def _request(self, prompt: Prompt, new_tokens: int) -> Request:
        return Request(prompt.request, words=prompt.words, max_new_tokens=new_tokens)

    @staticmethod
    def _check(ids: Sequence[int], prompt: Prompt) -> None:
        if tuple(ids) != prompt.ids:
            raise EngineError("the runtime saw another prompt than the peers are given")
