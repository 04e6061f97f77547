"""Hindsight: the outcome that a sample achieved becomes its command in training.

Rewards become levels (see `levels`; as in Quark, Lu et al., arXiv 2205.13636); words are
counted; command dropout replaces single values by "any", so that the model also
answers commands that leave an axis open.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm.distill.levels import Edges
from edge_slm.distill.samples import Sample
from edge_slm_runtime.command import (
    RELEVANCE_LEVELS,
    Command,
    CommandSchema,
    Position,
    default_axes,
)


@dataclass(frozen=True, slots=True)
class Record:
    """A request, its response, and the command that the response obeys; kind, fault: of the
    sample."""

    request: str
    response: str
    command: Command
    kind: str = "pair"
    fault: str = ""


def relabel(
    samples: Sequence[Sample],
    rewards: npt.NDArray[np.float32],
    edges: Edges,
    *,
    plain: bool = False,
) -> list[Record]:
    """Each sample with the command that it achieved; plain: with its task alone."""

    def achieved(sample: Sample, reward: float) -> Command:
        if plain:
            return Command(sample.task)
        return Command(sample.task, sample.words, edges[sample.task].of(reward, sample.words))

    return [
        Record(sample.request, sample.response, achieved(sample, reward), sample.kind, sample.fault)
        for sample, reward in zip(samples, rewards.tolist(), strict=True)
    ]


def build_schema(
    tasks: Sequence[str],
    records: Sequence[Record],
    levels: int = RELEVANCE_LEVELS,
    position: Position = "bottom",
    **spelling: Any,
) -> CommandSchema:
    """The command grammar; its support is counted in these records, if there are any.

    spelling: other fields of the schema.
    """
    axes = default_axes(tasks, levels)
    counts: dict[str, dict[str, dict[str, int]]] = {
        task: {axis.name: {} for axis in axes if axis.kind != "category"} for task in tasks
    }
    for record in records:
        asked = record.command.as_dict()
        for axis in axes:
            if axis.kind != "category":
                seen = counts[record.command.task or ""][axis.name]
                value = axis.value_of(asked[axis.name])
                seen[value] = seen.get(value, 0) + 1
    return CommandSchema(axes, counts if records else {}, position=position, **spelling)


def with_support_of(init: str, schema: CommandSchema) -> CommandSchema:
    """With the support of the checkpoint that training goes on from, if it has a grammar: what
    it saw counts, too. init: see `ModelRecipe`."""
    file = Path(init) / "command.json"
    if not init or not file.is_file():
        return schema
    before = CommandSchema.from_json(json.loads(file.read_text("utf-8"))).support
    support = {
        task: {
            axis: {
                value: counts.get(value, 0) + before.get(task, {}).get(axis, {}).get(value, 0)
                for value in {**before.get(task, {}).get(axis, {}), **counts}
            }
            for axis, counts in axes.items()
        }
        for task, axes in schema.support.items()
    }
    return replace(schema, support=support)


def drop(command: Command, share: float, rng: random.Random, everything: float = 0.0) -> Command:
    """Command dropout: each axis is left open with probability `share`, all of them with
    probability `everything`."""
    if everything and rng.random() < everything:
        return Command()
    kept = {
        name: None if rng.random() < share else value for name, value in command.as_dict().items()
    }
    return Command(**kept)  # type: ignore[arg-type]
