"""Greedy answers of a model's variants, through the runtime that ships.

Fidelity is measured on those of the fp32 model when the caller has no evaluation texts; token
ids go into the manifest, so that a device can check that it computes the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_slm_bench.metrics.examples import Scored
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_runtime.bundle import Golden
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import CheckpointError
from edge_slm_runtime.generate import SLM
from edge_slm_runtime.prompt import PromptForm
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
OPENINGS = {
    "chat": ("Describe", "Write a short story about", "What could be seen in a picture of"),
    "plain": ("This is a story about", "The picture shows", "Here is a description of"),
}
EXAMPLES, EXAMPLE_TOKENS = 24, 48
GOLDENS, GOLDEN_TOKENS = 4, 24


@dataclass(frozen=True, slots=True)
class Asked:
    """A request under its command, and the prompt that the model is given for it."""

    request: str
    command: Command
    prompt: tuple[int, ...]


def built_in_requests(source: Checkpoint, count: int, tokens: int) -> list[Asked]:
    """REQUESTS under commands of the schema's tasks and several lengths; to a model without
    a grammar, after OPENINGS.

    Raises CheckpointError when the model's context has no room for one of them
    and an answer of `tokens`.
    """
    asked, positions = [], source.decoder.positions
    for number in range(count):
        request, command = _built_in(source.form, number)
        prompt = tuple(source.codec.prompt(request, command))
        if len(prompt) + tokens > positions:
            raise CheckpointError(
                f"a context of {positions} tokens is too short to measure the model in",
                f"a prompt of {len(prompt)} and an answer of {tokens} must fit",
            )
        asked.append(Asked(request, command, prompt))
    return asked


def _built_in(form: PromptForm, number: int) -> tuple[str, Command]:
    request = REQUESTS[number % len(REQUESTS)]
    if (schema := form.schema) is None:
        openings = OPENINGS[form.kind]
        return f"{openings[number // len(REQUESTS) % len(openings)]} {request}", Command()
    task, words = schema.tasks[number % len(schema.tasks)], WORDS[number % len(WORDS)]
    return request, schema.check(Command(task, words, schema.levels - 1)).commanded


def own_answers(slm: SLM, source: Checkpoint) -> list[Scored]:
    """The model's own answers to `built_in_requests`, to be scored."""
    tokens = min(EXAMPLE_TOKENS, source.decoder.positions // 2)
    asked = built_in_requests(source, EXAMPLES, tokens)
    settings = {"no_repeat_ngram_size": 0, "no_repeat_words": False, "keep_length": False}
    requests = [
        Request.of(one.request, **one.command.as_dict(), **settings, max_new_tokens=tokens)
        for one in asked
    ]
    return [
        Scored((*one.prompt, *answer.token_ids), len(one.prompt))
        for one, answer in zip(asked, slm.generate_batch(requests, EXAMPLES), strict=True)
        if answer.token_ids
    ]


def golden_ids(slm: SLM, source: Checkpoint) -> list[tuple[int, ...]]:
    """A variant's token ids for the requests of `goldens`."""
    tokens = min(GOLDEN_TOKENS, source.decoder.positions // 2)
    asked = built_in_requests(source, GOLDENS, tokens)
    return [slm.greedy_ids(one.request, one.command, tokens) for one in asked]


def goldens(source: Checkpoint, ids: Mapping[str, Sequence[tuple[int, ...]]]) -> list[Golden]:
    """Requests with each variant's answers, greedy and without length promise.

    ids: of every variant, `golden_ids`.
    """
    tokens = min(GOLDEN_TOKENS, source.decoder.positions // 2)
    asked = built_in_requests(source, GOLDENS, tokens)
    return [
        Golden(one.request, one.command, tokens, {name: every[i] for name, every in ids.items()})
        for i, one in enumerate(asked)
    ]
