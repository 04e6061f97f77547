from __future__ import annotations

import random

import numpy as np
import pytest

from edge_slm.distill.hindsight import build_schema, drop, relabel
from edge_slm.distill.levels import level_edges
from edge_slm.distill.samples import Sample
from edge_slm_runtime.command import Command

SAMPLES = [Sample(f"r{i}", "one two three", "image") for i in range(200)] + [
    Sample(f"r{i}", "one two", "tags") for i in range(100)
]
REWARDS = np.concatenate([np.linspace(0.2, 0.9, 200), np.linspace(0.0, 0.3, 100)]).astype(
    np.float32
)


def test_levels_are_per_task_quantiles() -> None:
    records = relabel(SAMPLES, REWARDS, level_edges(SAMPLES, REWARDS))
    for task, share in (("image", 20), ("tags", 10)):
        levels = [r.command.relevance for r in records if r.command.task == task]
        assert levels == sorted(levels)  # type: ignore[type-var]
        counts = np.bincount(levels, minlength=10)
        assert counts == pytest.approx(np.full(10, share), abs=1)


def test_the_schema_counts_what_training_saw() -> None:
    schema = build_schema(
        ["image", "tags"], relabel(SAMPLES, REWARDS, level_edges(SAMPLES, REWARDS))
    )
    assert schema.support["image"]["words"] == {"3": 200}
    assert sum(schema.support["tags"]["relevance"].values()) == 100
    checked = schema.check(Command("tags", words=40))
    assert checked.commanded.words == 2
    assert "commanding 2" in checked.warnings[0]


def test_dropout_leaves_single_axes_unspecified() -> None:
    rng = random.Random(0)
    dropped = [drop(Command("image", 8, 9), 0.25, rng) for _ in range(2000)]
    for axis in ("task", "words", "relevance"):
        share = sum(getattr(c, axis) is None for c in dropped) / len(dropped)
        assert share == pytest.approx(0.25, abs=0.04)
    assert drop(Command("image", 8, 9), 0.0, rng) == Command("image", 8, 9)
