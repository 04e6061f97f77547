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
from random import Random

import edge_slm_runtime
from edge_slm_bench.metrics.examples import Scored
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_runtime.bundle import Golden, Variant
from edge_slm_runtime.command import Command
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError, RequestError
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
# Of the texts that quantisation is calibrated on. Their variety matters most: with 512 answers
# to REQUESTS alone, KL on held-out texts was a fifth higher than with 672 various ones.
SAMPLES = (128, 1024)  # at least, at most
SAMPLE_WORK = 11_600_000_000  # texts × parameters: what calibration takes grows with them
SAMPLE_TOKENS, SAMPLE_ROWS, SAMPLE_ROUND = 96, 32, 128
SAMPLE_WORDS = (4, 12, 24, 40, 72)
EXCERPT_WORDS = (4, 8, 16, 30)


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
    schema, positions = source.schema, source.decoder.positions
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
    tokens = min(EXAMPLE_TOKENS, source.decoder.positions // 2)
    asked = commanded_requests(source, EXAMPLES, tokens)
    answers = _answers(bundle, variant, asked, tokens)
    return [
        Scored((*one.prompt, *ids), len(one.prompt))
        for one, ids in zip(asked, answers, strict=True)
        if ids
    ]


def sampled_answers(bundle: Path, variant: Variant, source: Checkpoint) -> list[Scored]:
    """Texts as various as the model gives, none of them from outside: answers drawn at
    temperature 1 to REQUESTS, then to pieces of answers, then to pieces of those.

    Tasks, lengths and levels of the command vary, and everything random has a fixed seed.
    Fewer texts of a larger model, whose every position costs more: see `sample_count`.
    """
    tokens = min(SAMPLE_TOKENS, source.decoder.positions // 2)
    rng, count = Random(0), sample_count(source.decoder, source.parameters)
    heard, found = list(REQUESTS), list[Scored]()
    with edge_slm_runtime.load(
        bundle, engine=variant.engine, precision=variant.precision, verify=False
    ) as slm:
        for start in range(0, count, SAMPLE_ROUND):
            numbers = range(start, min(start + SAMPLE_ROUND, count))
            asked = [_drawn(source, heard, i, tokens, rng) for i in numbers]
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
                for seed, one in zip(numbers, asked, strict=True)
            ]
            answers = list(slm.generate_batch(requests, SAMPLE_ROWS))
            found += [
                Scored((*one.prompt, *answer.token_ids), len(one.prompt))
                for one, answer in zip(asked, answers, strict=True)
                if answer.token_ids
            ]
            heard = [answer.text for answer in answers if answer.text.strip()] or heard
    return found


def sample_count(decoder: Decoder, parameters: int) -> int:
    """How many texts a model is calibrated on; a narrow one has fewer moments to learn."""
    return max(SAMPLES[0], min(SAMPLES[1], 3 * decoder.width, SAMPLE_WORK // parameters))


def _drawn(
    source: Checkpoint, heard: Sequence[str], number: int, tokens: int, rng: Random
) -> Asked:
    """A request for some successive words of a text in `heard`, its prompt short enough for
    an answer of `tokens`; else one of REQUESTS."""
    schema, words = source.schema, rng.choice(heard).split()
    length = rng.choice(EXCERPT_WORDS)
    first = rng.randrange(max(1, len(words) - length + 1))
    level = rng.choice((None, None, len(schema.axis("relevance").values) - 1))
    command = Command(schema.tasks[number % len(schema.tasks)], rng.choice(SAMPLE_WORDS), level)
    command = schema.check(command).commanded
    for request in (" ".join(words[first : first + length]), REQUESTS[number % len(REQUESTS)]):
        try:
            prompt = tuple(schema.encode(request, command, source.codec.encode))
        except RequestError:  # an untrained model writes anything
            continue
        if len(prompt) + tokens <= source.decoder.positions:
            return Asked(request, command, prompt)
    raise CheckpointError(
        f"a context of {source.decoder.positions} tokens is too short to calibrate the model in",
        f"a prompt and an answer of {tokens} must fit",
    )


def goldens(bundle: Path, variants: Sequence[Variant], source: Checkpoint) -> list[Golden]:
    """Requests with the ids that each variant gives, greedily and without length promise."""
    tokens = min(GOLDEN_TOKENS, source.decoder.positions // 2)
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
