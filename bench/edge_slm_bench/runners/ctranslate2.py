"""CTranslate2: its own loop, greedy, on one stream of `threads` threads.

The loop cannot be watched for free: for a callback per token it waits for Python's lock
(measured on the 11M reference model: 4 to 15% slower). So TTFT comes from a run of one
token, and the whole answer from a second run: a `TimedAnswer` has the first and the last time
alone. The extra prefill is in no latency, but in the energy and in the time for which a
server is occupied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edge_slm_bench.runners.base import Float32, Prompt, Spec, TimedAnswer
from edge_slm_runtime.engines.base import first_line
from edge_slm_runtime.errors import DependencyMissing, EngineError

COMPUTE_TYPE = {"int8": "int8_float32", "fp32": "float32"}


def open(spec: Spec, threads: int) -> CTranslate2Runner:  # noqa: A001
    """Raises DependencyMissing, EngineError."""
    try:
        import ctranslate2
    except ImportError:
        raise DependencyMissing(
            "CTranslate2 is not installed", "pip install 'edge-slm[ctranslate2]'"
        ) from None
    try:
        generator = ctranslate2.Generator(
            spec.path,
            device="cpu",
            compute_type=COMPUTE_TYPE[spec.precision],
            inter_threads=1,
            intra_threads=threads,
        )
    except RuntimeError as error:
        raise EngineError(f"CTranslate2 cannot load {spec.path}: {first_line(error)}") from None
    file = Path(spec.path) / "vocabulary.json"
    return CTranslate2Runner(generator, json.loads(file.read_text("utf-8")))


class CTranslate2Runner:
    def __init__(self, generator: Any, tokens: list[str]) -> None:
        self._generator, self._tokens = generator, tokens

    def single(self, prompt: Prompt, new_tokens: int) -> TimedAnswer:
        seconds = []
        for length in (1, new_tokens):
            start = perf_counter()
            (ids,) = self._generate([prompt], length)
            seconds.append(perf_counter() - start)
        return TimedAnswer(ids, tuple(seconds))

    def batch(self, prompts: Sequence[Prompt], new_tokens: int) -> list[tuple[int, ...]]:
        return self._generate(prompts, new_tokens)

    def logits(self, ids: Sequence[int]) -> Float32:
        rows: Float32 = np.asarray(self._generator.forward_batch([list(ids)]), np.float32)[0]
        return rows

    def close(self) -> None:
        self._generator = None

    def _generate(self, prompts: Sequence[Prompt], new_tokens: int) -> list[tuple[int, ...]]:
        results = self._generator.generate_batch(
            [[self._tokens[i] for i in prompt.ids] for prompt in prompts],
            max_length=new_tokens,
            sampling_topk=1,
            end_token=[],  # none: end-of-text is a token like others
            include_prompt_in_result=False,
        )
        return [tuple(result.sequences_ids[0]) for result in results]
