"""Greedy answers of a bundle's variants, through the runtime that ships.

They serve twice: the fp32 model's own answers are what fidelity is measured on
when the caller has no evaluation texts, and the token ids go into the manifest so
that a device can check that it computes what was converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from edge_slm_runtime.bundle import Golden, Variant
from edge_slm_runtime.command import Command, CommandSchema
from edge_slm_runtime.text import TextCodec

from edge_slm_converters.gate import Scored

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


def commanded_requests(schema: CommandSchema, count: int) -> list[tuple[str, Command]]:
    """Requests of our own, over the schema's tasks and several lengths."""
    tasks, words, requests = cycle(schema.tasks), cycle(WORDS), cycle(REQUESTS)
    top = len(schema.axis("relevance").values) - 1
    return [
        (next(requests), schema.check(Command(next(tasks), next(words), top)).commanded)
        for _ in range(count)
    ]


def own_answers(
    bundle: Path, variant: Variant, schema: CommandSchema, codec: TextCodec
) -> list[Scored]:
    """What `variant` itself answers to `commanded_requests`, to be scored."""
    asked = commanded_requests(schema, EXAMPLES)
    answers = _answers(bundle, variant, asked, EXAMPLE_TOKENS)
    prompts = [schema.encode(request, command, codec.encode) for request, command in asked]
    return [
        Scored((*prompt, *ids), len(prompt))
        for prompt, ids in zip(prompts, answers, strict=True)
        if ids
    ]


def goldens(bundle: Path, variants: Sequence[Variant], schema: CommandSchema) -> list[Golden]:
    """Requests with the ids that each variant gives, greedily and without length promise."""
    asked = commanded_requests(schema, GOLDENS)
    found = [Golden(request, command, GOLDEN_TOKENS, {}) for request, command in asked]
    for variant in variants:
        answers = _answers(bundle, variant, asked, GOLDEN_TOKENS)
        found = [
            replace(golden, ids={**golden.ids, variant.name: ids})
            for golden, ids in zip(found, answers, strict=True)
        ]
    return found


def _answers(
    bundle: Path, variant: Variant, asked: Sequence[tuple[str, Command]], tokens: int
) -> list[tuple[int, ...]]:
    """Token ids of greedy answers."""
    import edge_slm_runtime

    with edge_slm_runtime.load(
        bundle, engine=variant.engine, precision=variant.precision, verify=False
    ) as slm:
        answers = []
        for request, command in asked:
            generation = slm.generate(
                request,
                task=command.task,
                words=command.words,
                relevance=command.relevance,
                max_new_tokens=tokens,
                keep_length=False,
            )
            answers.append(generation.token_ids)
        return answers
