"""The evaluation: generate a grid, score it, compute every figure from it.

docs/evaluation.md defines the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from edge_slm.distill.evaluate import figures
from edge_slm.distill.evaluate.comparison import compare
from edge_slm.distill.evaluate.evidence import Evidence, Other, Pair, Scores, Texts
from edge_slm.distill.evaluate.grid import LENGTHS, Block, Grid, build_grid, generate
from edge_slm.distill.evaluate.scorers import (
    Cosine,
    StaticCosine,
    TaskClassifier,
    UniversalCosine,
)
from edge_slm.distill.evaluate.trivial import echoes, nearest
from edge_slm.distill.levels import Edges, Levels
from edge_slm.distill.rewards import Keywords, Relevance, Reward
from edge_slm.distill.samples import Sample
from edge_slm.progress import StageProgress, silent
from edge_slm_bench.metrics.quality import RESAMPLES
from edge_slm_runtime import SLM, Generation, Request
from edge_slm_runtime.errors import DataError

_UNSCORED = ("kept", "tasks")  # blocks whose texts are only counted or classified


def evaluate(
    slm: SLM,
    samples: Sequence[Sample],
    *,
    train_samples: Sequence[Sample] = (),
    answers: Mapping[str, Mapping[str, str]] | None = None,
    baselines: Mapping[str, SLM] | None = None,
    best_of: int = 4,
    reward: Reward | None = None,
    lengths: Sequence[int] = LENGTHS,
    report: StageProgress = silent,
) -> dict[str, Any]:
    """Every figure, JSON-ready, for `show` and `write_html`.

    samples: held-out, with the reference answers. train_samples: for the task classifier and
    the nearest training response; without them both are left out. answers: name → request → text of
    another model. baselines: models that get the task alone. best_of: candidates of the
    best-of-n baseline; below 2 it is left out. reward: that of the training (default:
    MiniLM relevance). lengths: words to command.

    Samples that do not fit the context under one of the commands are counted as
    `too_long`. Raises DataError (fewer than two samples left, or a bundle without the
    edges of its levels), UnknownTask, NotSupportedByEngine (best-of-n on an engine without
    seeds), DependencyMissing.
    """
    edges = _level_edges(slm, samples)
    reward, static, universal = reward or Relevance(), StaticCosine(), UniversalCosine()
    rewards = reward.score(samples)
    report("task classifier", 0, 1, "")
    classifier = TaskClassifier(train_samples, slm.schema.tasks)
    report("task classifier", 1, 1, f"{len(train_samples)} texts")
    grid = build_grid(
        slm,
        samples,
        own_levels=[edges[s.task].of(r, s.words) for r, s in zip(rewards, samples, strict=True)],
        lengths=lengths,
        task_words=classifier.usual_words if len(classifier.tasks) > 1 else {},
        best_of=best_of if best_of > 1 else 0,
    )
    if len(grid.samples) < 2:
        raise DataError(f"{len(grid.samples)} held-out requests are too few", "give more data")
    outs = generate(slm, _flat(grid.blocks.values()), "generate", report)
    written = _written(grid, outs)
    others = [
        *_trivial(grid, train_samples, static),
        *_others(grid, baselines or {}, answers or {}, report),
    ]
    scored = [texts for name, texts in written.items() if name not in _UNSCORED]
    pairs = _pairs(grid, [*scored, *(other.texts for other in others)])
    scores = Scores(reward, (static, universal, Keywords()), pairs, report)
    report("figures", 0, 1, "")
    evidence = Evidence(grid, written, others, scores, edges)
    result = {
        **_about(slm, evidence, outs),
        "length": figures.length(evidence),
        "relevance": figures.relevance(evidence),
        "cross_talk": figures.cross_talk(evidence),
        "task": figures.task(evidence, classifier) if len(classifier.tasks) > 1 else None,
        "answers": compare(evidence, static),
        "texts": figures.examples(evidence),
    }
    report("figures", 1, 1, "")
    return result


def _about(slm: SLM, evidence: Evidence, outs: Mapping[Request, Generation]) -> dict[str, Any]:
    """The model and how much of it was measured."""
    scores = evidence.scores
    return {
        "model": {
            "name": slm.manifest.name,
            "variant": slm.variant.name,
            "parameters": slm.manifest.parameters,
            "recipe": _recipe(slm).get("digest"),
            "levels": slm.schema.levels,
        },
        "requests": len(evidence.samples),
        "too_long": evidence.grid.too_long,
        "generations": len(outs),
        "commands_moved": sum(bool(out.warnings) for out in outs.values()),
        "tasks": {
            task: int(evidence.tasks[task].sum())
            for task in slm.schema.tasks
            if task in evidence.tasks
        },
        "scorers": [
            {"name": name, "training": i < scores.training} for i, name in enumerate(scores.names)
        ],
        "intervals": f"95%, bootstrap over requests, {RESAMPLES} resamples",
    }


def _pairs(grid: Grid, texts: Iterable[Texts]) -> Iterator[Pair]:
    return chain.from_iterable(some.pairs(grid.samples) for some in texts)


def _written(grid: Grid, outs: Mapping[Request, Generation]) -> dict[str, Texts]:
    written = {
        name: Texts(
            [[outs[r].text if r else None for r in row] for row in block],
            [[float(r.words) if r and r.words else np.nan for r in row] for row in block],
        )
        for name, block in grid.blocks.items()
    }
    written["references"] = Texts([[sample.response] for sample in grid.samples])
    return written


def _trivial(grid: Grid, train: Sequence[Sample], encoder: Cosine) -> list[Other]:
    """The baselines that need no model."""
    found = {"request with a fixed ending": echoes(grid.samples)}
    if train:
        found["nearest training response"] = nearest(grid.samples, train, encoder)
    return [Other(name, "baseline", _column(texts)) for name, texts in found.items()]


def _others(
    grid: Grid,
    baselines: Mapping[str, SLM],
    answers: Mapping[str, Mapping[str, str]],
    report: StageProgress,
) -> list[Other]:
    others = []
    for name, slm in baselines.items():
        asked = [Request(s.request, s.task, keep_length=False) for s in grid.samples]
        outs = generate(slm, asked, f"generate {name}", report)
        others.append(Other(name, "baseline", _column([outs[r].text for r in asked])))
    for name, texts in answers.items():
        column = _column([texts.get(sample.request) for sample in grid.samples])
        others.append(Other(name, "answers", column))
    return others


def _column(texts: Iterable[str | None]) -> Texts:
    return Texts([[text] for text in texts])


def _flat(blocks: Iterable[Block]) -> list[Request | None]:
    return [request for block in blocks for row in block for request in row]


def _recipe(slm: SLM) -> dict[str, Any]:
    return dict(slm.manifest.provenance.get("recipe") or {})


def _level_edges(slm: SLM, samples: Sequence[Sample]) -> Edges:
    stored = _recipe(slm).get("data", {}).get("relevance_level_edges") or {}
    edges = {task: Levels.from_json(data) for task, data in stored.items()}
    for sample in samples:
        slm.schema.axis("task").value_of(sample.task)
        if sample.task not in edges:
            raise DataError(
                f"the bundle does not say where the relevance levels of {sample.task!r} lie",
                "convert a trained model",
            )
    return edges
