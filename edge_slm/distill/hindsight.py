"""Hindsight: the outcome that a sample achieved becomes its command in training.

Rewards become levels by per-task quantiles (as in Quark, Lu et al., arXiv 2205.13636);
words are counted; command dropout replaces single values by "any", so that the model also
answers commands that leave an axis open.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_slm.distill.samples import Sample
from edge_slm_runtime.command import (
    RELEVANCE_LEVELS,
    Command,
    CommandSchema,
    Position,
    default_axes,
)

Edges = Mapping[str, list[float]]  # task → the inner quantiles of its rewards


@dataclass(frozen=True, slots=True)
class Record:
    """A request, its response, and the command that the response obeys."""

    request: str
    response: str
    command: Command


def level_edges(
    samples: Sequence[Sample],
    rewards: npt.NDArray[np.float32],
    levels: int = RELEVANCE_LEVELS,
    scope: Literal["task", "global"] = "task",
) -> Edges:
    """Per task the `levels` - 1 inner quantiles of the reward; level k begins at edge k - 1.

    scope "global": every task has the quantiles of all rewards together.
    """
    by_task: dict[str, list[float]] = defaultdict(list)
    for sample, reward in zip(samples, rewards, strict=True):
        by_task[sample.task].append(float(reward))
    quantiles = np.arange(1, levels) / levels
    pools = by_task if scope == "task" else dict.fromkeys(by_task, rewards)
    return {task: np.quantile(r, quantiles).round(4).tolist() for task, r in pools.items()}


def level_of(reward: float, edges: Sequence[float]) -> int:
    """The level of a reward, 0 … len(edges)."""
    return int(np.searchsorted(edges, reward, "right"))


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
        return Command(sample.task, sample.words, level_of(reward, edges[sample.task]))

    return [
        Record(sample.request, sample.response, achieved(sample, reward))
        for sample, reward in zip(samples, rewards.tolist(), strict=True)
    ]


def build_schema(
    tasks: Sequence[str],
    records: Sequence[Record],
    levels: int = RELEVANCE_LEVELS,
    position: Position = "bottom",
) -> CommandSchema:
    """The command grammar; its support is counted in these records."""
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
    return CommandSchema(axes, counts, position=position)


def drop(command: Command, share: float, rng: random.Random) -> Command:
    """Command dropout: each axis is left unspecified with probability `share`."""
    kept = {
        name: None if rng.random() < share else value for name, value in command.as_dict().items()
    }
    return Command(**kept)  # type: ignore[arg-type]
