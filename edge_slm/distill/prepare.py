"""From sample files to training records: read, vary, score, relabel, tokenise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm.distill.hindsight import Edges, build_schema, level_edges, relabel
from edge_slm.distill.packing import Encoded, encode_records
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.rewards import Relevance
from edge_slm.distill.samples import Sample, load_samples, vary
from edge_slm.distill.tokenizer import train_tokenizer
from edge_slm_runtime.command import CommandSchema

# (stage, done, total, remark): the one way in which long work tells how far it is.
Report = Callable[[str, int, int, str], None]


def silent(stage: str, done: int, total: int, remark: str = "") -> None:
    """A Report that says nothing."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that training needs; the same recipe and data give the same object."""

    schema: CommandSchema
    edges: Edges
    tokenizer: Any
    train: list[Encoded]
    valid: list[Encoded]
    facts: dict[str, Any]  # counts, for the metrics file and the model card


def prepare(
    recipe: Recipe, data: Sequence[str | Path], cache: Path | None, report: Report = silent
) -> Prepared:
    """Raises DataError (unusable data, by file and line) and DependencyMissing."""
    report("read", 0, 1, "")
    pairs, held, lone = load_samples(data, recipe.data, recipe.seed)
    samples = vary(pairs, lone, recipe.hindsight, recipe.data.holdout_percent, recipe.seed)
    report("read", 1, 1, f"{len(pairs)} pairs → {len(samples)} samples")

    reward = Relevance(cache, bf16=recipe.train.precision == "bf16")
    scores = reward.score(samples + held, lambda done, total: report("score", done, total, ""))
    edges = level_edges(samples, scores[: len(samples)])
    records = relabel(samples, scores[: len(samples)], edges)
    valid = relabel(held, scores[len(samples) :], edges)
    schema = build_schema(recipe.data.tasks, records)

    report("tokenizer", 0, 1, "")
    texts = [text for sample in pairs for text in (sample.request, sample.response)]
    tokenizer = train_tokenizer(texts, schema, recipe.model.vocab_size)
    report("tokenizer", 1, 1, f"{tokenizer.get_vocab_size()} tokens")

    positions = recipe.model.positions
    train_encoded, too_long = encode_records(records, tokenizer, schema, positions)
    valid_encoded, _ = encode_records(valid, tokenizer, schema, positions)
    facts = {
        "digest": hashlib.sha256(repr((pairs, lone)).encode()).hexdigest(),
        "pairs": len(pairs),
        "held_out": len(held),
        "samples": len(samples),
        "samples_too_long": too_long,
        "samples_by_task_and_kind": _count(samples),
        "mean_relevance_by_task": _means(samples, scores[: len(samples)]),
        "relevance_level_edges": dict(edges),
        "tokens_per_word": round(
            sum(len(e.response) - 1 for e in train_encoded)
            / max(1, sum(e.record.command.words or 0 for e in train_encoded)),
            3,
        ),
    }
    return Prepared(schema, edges, tokenizer, train_encoded, valid_encoded, facts)


def _count(samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for sample in samples:
        kinds = counts.setdefault(sample.task, {})
        kinds[sample.kind] = kinds.get(sample.kind, 0) + 1
    return counts


def _means(samples: Sequence[Sample], scores: Any) -> dict[str, float]:
    tasks = np.array([sample.task for sample in samples])
    return {str(t): round(float(scores[tasks == t].mean()), 4) for t in np.unique(tasks)}
