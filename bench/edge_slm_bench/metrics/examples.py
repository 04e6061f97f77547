"""Evaluation texts: what fidelity and adherence are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_slm_runtime.command import Command
from edge_slm_runtime.text import TextCodec


@dataclass(frozen=True, slots=True)
class Example:
    """A commanded request and the response that is scored."""

    request: str
    command: Command
    response: str


@dataclass(frozen=True, slots=True)
class Scored:
    """Token ids of prompt and response; scored are the predictions of ids[prompt:]."""

    ids: tuple[int, ...]
    prompt: int


def to_scored(examples: Sequence[Example], codec: TextCodec, positions: int) -> list[Scored]:
    """Examples as token ids, cut at the model's context of `positions`."""
    sequences = []
    for example in examples:
        prompt = codec.prompt(example.request, codec.form.check(example.command).commanded)
        ids = [*prompt, *codec.encode(example.response), codec.ends[0]][:positions]
        if len(ids) > len(prompt):
            sequences.append(Scored(tuple(ids), len(prompt)))
    return sequences
