"""The model compared with its baselines, the references and answers of other models."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm.distill.evaluate.by_task import figures_by_task
from edge_slm.distill.evaluate.evidence import Evidence, Other, Texts
from edge_slm.distill.evaluate.faults import faults
from edge_slm.distill.evaluate.figures import diversity
from edge_slm.distill.evaluate.scorers import StaticCosine
from edge_slm_bench.metrics.quality import (
    Float64,
    bootstrap,
    bootstrap_mean,
    bootstrap_ratio,
    distinct,
    half_samples,
    mean,
    self_similarity,
    spearman,
    within_tolerance,
)


def compare(e: Evidence, embedder: StaticCosine) -> list[dict[str, Any]]:
    """A row per set of answers; the first is the model at its highest level.

    model_ratio: figure of the model ÷ figure of the row, over the requests that the row
    answered. obedience: of the answers to the words and level of the references.
    """
    top = e.levels - 1
    model = e.written["levels"].only(top)
    sets = [
        Other(f"level {top}", "model", model),
        Other("own command", "model", e.written["own"]),
        Other("shuffled command", "model", e.written["shuffled"]),
        Other("no command", "model", e.written["bare"]),
    ]
    candidates = e.written["candidates"]
    if best_of := len(candidates.rows[0]):
        best = zip(candidates.rows, e.score(candidates).argmax(1), strict=True)
        texts = Texts([[row[at]] for row, at in best])
        sets.append(Other(f"best of {best_of}, any level", "model", texts))
    sets += [other for other in e.others if other.kind == "baseline"]
    sets.append(Other("references", "references", e.written["references"]))
    sets += [other for other in e.others if other.kind == "answers"]
    return [
        {"name": row.name, "kind": row.kind, **_row(e, embedder, row.texts, model)} for row in sets
    ]


def _row(e: Evidence, embedder: StaticCosine, texts: Texts, model: Texts) -> dict[str, Any]:
    at = np.array([i for i, text in enumerate(texts.column()) if text is not None], int)
    if not at.size:
        return {"n": 0, "by_task": {}}
    samples = [e.samples[i] for i in at]
    theirs, mine = ([column[i] or "" for i in at] for column in (texts.column(), model.column()))
    scored = {name: (e.score(model, name)[at], e.score(texts, name)[at]) for name in e.scores.names}
    words = texts.words()[at]
    own_words = np.array([[sample.words] for sample in samples], float)
    level = e.achieved_levels(texts)[at]
    own_level = e.achieved_levels(e.written["references"])[at]
    same = [sample.task for sample in samples]
    likeness = [self_similarity(embedder.embed(column), same) for column in (mine, theirs)]
    index = np.arange(len(at))

    def alike(table: Float64, rows: npt.NDArray[np.int64]) -> float:
        return mean(table[np.ix_(rows, rows)])

    ratios = {name: bootstrap_ratio(*pair) for name, pair in scored.items()}
    ratios["distinct_2"] = half_samples(
        lambda a, b: _over(distinct(a), distinct(b)),
        np.array(mine, object),
        np.array(theirs, object),
    )
    ratios["self_similarity"] = bootstrap(
        lambda rows: _over(alike(likeness[0], rows), alike(likeness[1], rows)), index
    )
    obedience = {
        "words_hit_rate": bootstrap_mean(within_tolerance(own_words, words)),
        "words_spearman": bootstrap(spearman, own_words, words),
        "level_hit_rate": bootstrap_mean((level == own_level).astype(float)),
        "level_spearman": bootstrap(spearman, own_level, level),
    }
    return {
        "n": len(at),
        "words": mean(words),
        "scores": {name: bootstrap_mean(pair[1]).as_dict() for name, pair in scored.items()},
        "self_similarity": bootstrap(lambda rows: alike(likeness[1], rows), index).as_dict(),
        **diversity(samples, theirs),
        "faults": faults(samples, theirs),
        "model_ratio": {name: figure.as_dict() for name, figure in ratios.items()},
        "obedience": {name: figure.as_dict() for name, figure in obedience.items()},
        "by_task": figures_by_task(e, texts),
    }


def _over(above: float, below: float) -> float:
    return above / below if below else float("nan")
