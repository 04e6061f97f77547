"""Answers of a bundle's variants, through the runtime that ships.

They serve three times: greedy ones of the fp32 model are what fidelity is measured on when
the caller has no evaluation texts; sampled ones are what quantisation is calibrated on;
and token ids go into the manifest so that a device can check that it computes what was
converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import edge_slm_runtime
from edge_slm_bench.examples import Scored
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_runtime.bundle import Golden, Variant
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import CheckpointError
from edge_slm_runtime.records import Request

REQUESTS = (
    "a cosy cabin in the snow",
    "an old fisherman mending his nets",
    "neon street in the rain",
    "a fox asleep under autumn leaves",
    "logo for a small bakery",
    "astronaut playing the cello on the moon",
    "market square at dawn",
    "a dragon made of paper",
)
WORDS = (12, 24, 40)
EXAMPLES, EXAMPLE_TOKENS = 24, 48
GOLDENS, GOLDEN_TOKENS = 4, 24
SAMPLES, SAMPLE_TOKENS, SAMPLE_ROWS = 128, 64, 16


@dataclass(frozen=True, slots=True)
class Asked:
    request: str
    command: Command
    prompt: tuple[int, ...]


def commanded_requests(source: Checkpoint, count: int, tokens: int) -> list[Asked]:
    """Requests of our own, over the schema's tasks and several lengths.

    Raises CheckpointError when the model's context has no room for one of them
    and an answer of `tokens`.
    """
    schema, positions = source.schema, source.config.positions
    tasks, words, requests = cycle(schema.tasks), cycle(WORDS), cycle(REQUESTS)
    top = len(schema.axis("relevance").values) - 1
    asked = []
    for _ in range(count):
        request = next(requests)
        command = schema.check(Command(next(tasks), next(words), top)).commanded
        prompt = tuple(schema.encode(request, command, source.codec.encode))
        if len(prompt) + tokens > positions:
            raise CheckpointError(
                f"a context of {positions} tokens is too short to measure the model in",
                f"a prompt of {len(prompt)} and an answer of {tokens} must fit",
            )
        asked.append(Asked(request, command, prompt))
    return asked


def own_answers(bundle: Path, variant: Variant, source: Checkpoint) -> list[Scored]:
    """What `variant` itself answers to `commanded_requests`, to be scored."""
    tokens = min(EXAMPLE_TOKENS, source.config.positions // 2)
    asked = commanded_requests(source, EXAMPLES, tokens)
    answers = _answers(bundle, variant, asked, tokens)
    return [
        Scored((*one.prompt, *ids), len(one.prompt))
        for one, ids in zip(asked, answers, strict=True)
        if ids
    ]


def sampled_answers(bundle: Path, variant: Variant, source: Checkpoint) -> list[Scored]:
    """Answers as various as the model gives: drawn at temperature 1, the seeds fixed."""
    tokens = min(SAMPLE_TOKENS, source.config.positions // 2)
    asked = commanded_requests(source, SAMPLES, tokens)
    requests = [
        Request(
            one.request,
            one.command.task,
            one.command.words,
            one.command.relevance,
            temperature=1.0,
            no_repeat_ngram_size=0,
            seed=seed,
            max_new_tokens=tokens,
            keep_length=False,
        )
        for seed, one in enumerate(asked)
    ]
    with edge_slm_runtime.load(
        bundle, engine=variant.engine, precision=variant.precision, verify=False
    ) as slm:
        answers = slm.generate_batch(requests, SAMPLE_ROWS)
        return [
            Scored((*one.prompt, *answer.token_ids), len(one.prompt))
            for one, answer in zip(asked, answers, strict=True)
            if answer.token_ids
        ]


def goldens(bundle: Path, variants: Sequence[Variant], source: Checkpoint) -> list[Golden]:
    """Requests with the ids that each variant gives, greedily and without length promise."""
    tokens = min(GOLDEN_TOKENS, source.config.positions // 2)
    asked = commanded_requests(source, GOLDENS, tokens)
    found = [Golden(one.request, one.command, tokens, {}) for one in asked]
    for variant in variants:
        answers = _answers(bundle, variant, asked, tokens)
        found = [
            replace(golden, ids={**golden.ids, variant.name: ids})
            for golden, ids in zip(found, answers, strict=True)
        ]
    return found


def _answers(
    bundle: Path, variant: Variant, asked: Sequence[Asked], tokens: int
) -> list[tuple[int, ...]]:
    """Token ids of greedy answers."""
    with edge_slm_runtime.load(
        bundle, engine=variant.engine, precision=variant.precision, verify=False
    ) as slm:
        return [slm.greedy_ids(one.request, one.command, tokens) for one in asked]
