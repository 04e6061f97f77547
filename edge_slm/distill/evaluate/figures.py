"""Figures computed from the evidence; each function returns one part, JSON-ready."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_slm.distill.evaluate.evidence import Evidence
from edge_slm.distill.evaluate.scorers import TaskClassifier
from edge_slm.distill.samples import Sample
from edge_slm_bench.metrics.quality import (
    Estimate,
    Float64,
    adherence,
    bootstrap,
    bootstrap_mean,
    bootstrap_ratio,
    concordance,
    confusion,
    copied_words,
    distinct,
    echo,
    mean,
    monotonicity,
    spearman,
    within_tolerance,
)
from edge_slm_runtime.keywords import content_stems

_DRAWS = 200  # of the shuffled baseline


def length(e: Evidence) -> dict[str, Any]:
    """Commanded and achieved words: in all, per length, per task; confusion and scatter."""
    result: dict[str, Any] = {}
    asked = np.array(e.written["lengths"].asked)
    known = np.isfinite(asked)
    for name, block in (("model alone", "lengths"), ("with the promise", "kept")):
        got = e.written[block].words()
        hits = within_tolerance(asked, got)
        columns = {
            str(words): (known[:, i], slice(i, i + 1)) for i, words in enumerate(e.grid.words)
        }
        result[name] = {
            "all": adherence(asked, got, hits),
            "by_length": {
                words: adherence(asked[at], got[at], hits[at])
                for words, at in columns.items()
                if at[0].any()
            },
            "by_task": {
                task: adherence(asked[at], got[at], hits[at]) for task, at in e.tasks.items()
            },
        }
    got = e.written["lengths"].words()
    distance = np.log(np.maximum(got, 1))[..., None] - np.log(e.grid.words)
    index = np.where(known, np.arange(len(e.grid.words)), np.nan)
    counts = Counter(zip(asked[known].astype(int), got[known].astype(int), strict=True))
    return result | {
        "confusion": {
            "labels": [str(words) for words in e.grid.words],
            "counts": confusion(index, np.abs(distance).argmin(-1), len(e.grid.words)).tolist(),
        },
        "points": [[int(a), int(g), n] for (a, g), n in sorted(counts.items())],
    }


def relevance(e: Evidence) -> dict[str, Any]:
    """Commanded level, achieved reward and level, at the lengths of the references."""
    texts, count = e.written["levels"], e.levels
    asked = _level_columns(e)
    got = e.achieved_levels(texts)[:, :count]
    hits = (asked == got).astype(float)
    scored = {name: e.score(texts, name) for name in e.scores.names}
    references = {name: e.score(e.written["references"], name) for name in e.scores.names}
    rewards = scored[e.scores.names[0]][:, :count]
    return {
        "rows": [
            {
                "level": i if i < count else None,
                "words": mean(texts.words()[:, i]),
                "scores": {n: bootstrap_mean(s[:, i]).as_dict() for n, s in scored.items()},
                "ratio": {
                    n: bootstrap_ratio(s[:, i : i + 1], references[n]).as_dict()
                    for n, s in scored.items()
                },
                **diversity(e.samples, [text or "" for text in texts.column(i)]),
            }
            for i in range(count + 1)
        ],
        "all": {
            **adherence(asked, got, hits),
            "monotonicity": monotonicity(asked, rewards).as_dict(),
        },
        "by_task": {
            task: {
                **adherence(asked[at], got[at], hits[at]),
                "monotonicity": monotonicity(asked[at], rewards[at]).as_dict(),
            }
            for task, at in e.tasks.items()
        },
        "monotonicity": {n: monotonicity(asked, s[:, :count]).as_dict() for n, s in scored.items()},
        "spearman_of_means": {
            n: bootstrap(_spearman_of_means, s[:, :count]).as_dict() for n, s in scored.items()
        },
        "shuffled": _shuffled(asked, rewards),
        "confusion": {
            "labels": [str(level) for level in range(count)],
            "counts": confusion(asked, got, count).tolist(),
        },
    }


def cross_talk(e: Evidence) -> dict[str, Any]:
    """Influence of the command of one axis on the other; monotonicity 0.5 is none."""
    own = np.array([[sample.words] for sample in e.samples], float)
    share = e.written["levels"].words()[:, : e.levels] / own
    asked = np.array(e.written["lengths"].asked)
    rewards = e.score(e.written["lengths"])
    # Less the mean of the request, because tasks are commanded different lengths.
    known = np.isfinite(rewards).sum(1, keepdims=True)
    shift = rewards - np.nansum(rewards, 1, keepdims=True) / np.maximum(known, 1)
    shift[known[:, 0] < 2] = np.nan
    return {
        "words_by_level": {
            "monotonicity": monotonicity(_level_columns(e), share).as_dict(),
            "rows": [
                {"level": i, "words_per_asked": bootstrap_mean(share[:, i]).as_dict()}
                for i in range(e.levels)
            ],
        },
        "reward_by_length": {
            "monotonicity": monotonicity(asked, rewards).as_dict(),
            "rows": [
                {"words": words, "shift": bootstrap_mean(shift[rows, i]).as_dict()}
                for i, words in enumerate(e.grid.words)
                if (rows := np.isfinite(shift[:, i])).any()
            ],
        },
    }


def task(e: Evidence, classifier: TaskClassifier) -> dict[str, Any]:
    """Every request commanded as every task, and the tasks that the classifier predicts.

    own_accuracy: of the requests of that task alone. references_accuracy: of the same
    classifier on the held-out references, its upper bound.
    """
    names = classifier.tasks
    size = len(names)
    rows = e.written["tasks"].rows
    predicted = classifier.predict([text or "" for row in rows for text in row]).reshape(-1, size)
    asked = np.tile(np.arange(size), (len(rows), 1))
    hits = (predicted == asked).astype(float)
    own = np.array([[sample.task == name for name in names] for sample in e.samples])
    known = [sample for sample in e.samples if sample.task in names]
    truth = np.array([names.index(sample.task) for sample in known])
    named = classifier.predict([sample.response for sample in known])
    right = (truth == named).astype(float)
    return {
        "accuracy": bootstrap_mean(hits).as_dict(),
        "own_accuracy": bootstrap_mean(np.where(own, hits, np.nan)).as_dict(),
        "references_accuracy": bootstrap_mean(right).as_dict(),
        "by_task": {
            name: {
                "words": classifier.usual_words[name],
                "accuracy": bootstrap_mean(hits[:, i]).as_dict(),
                "own_accuracy": bootstrap_mean(hits[own[:, i], i]).as_dict(),
                "references_accuracy": bootstrap_mean(right[truth == i]).as_dict(),
            }
            for i, name in enumerate(names)
        },
        "confusion": {"labels": names, "counts": confusion(asked, predicted, size).tolist()},
        "references_confusion": {"labels": names, "counts": confusion(truth, named, size).tolist()},
    }


def examples(e: Evidence) -> list[dict[str, Any]]:
    """Every request with its answer at the highest level and the length of the reference."""
    texts, top = e.written["levels"], e.levels - 1
    rewards = e.score(texts)[:, top]
    return [
        {
            "task": sample.task,
            "request": sample.request,
            "words": sample.words,
            "text": text,
            "reward": float(reward),
            "reference": sample.response,
        }
        for sample, text, reward in zip(e.samples, texts.column(top), rewards, strict=True)
    ]


def diversity(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, Any]:
    """Diversity of the texts, and the words that they share with their requests."""
    pairs = [(sample.request, text) for sample, text in zip(samples, texts, strict=True)]
    kept = np.array([copied_words(*pair) for pair in pairs])
    echoed = np.array([echo(*pair) for pair in pairs])
    added = np.array([float(added_words(*pair)) for pair in pairs])
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "echo": bootstrap_mean(echoed).as_dict(),
        "request_words_kept": bootstrap_mean(kept).as_dict(),
        "added_words": bootstrap_mean(added).as_dict(),
    }


def added_words(request: str, text: str) -> int:
    """How many content words the text adds: those not in the request, each counted once and in
    any inflection."""
    return len(set(content_stems(text)) - set(content_stems(request)))


def _shuffled(asked: Float64, rewards: Float64) -> dict[str, Any]:
    """The chance level: the levels of every request are permuted, many times.

    Generations are then measured against commands that they did not get. The interval
    contains 95% of the draws.
    """
    rng = np.random.default_rng(0)
    draws = [rng.permuted(rewards, axis=1) for _ in range(_DRAWS)]
    pairs = [concordance(asked, draw).sum(0) for draw in draws]

    def spread(values: Sequence[float]) -> dict[str, float | int | None]:
        low, high = np.quantile(values, [0.025, 0.975])
        return Estimate(float(np.mean(values)), float(low), float(high), len(rewards)).as_dict()

    return {
        "rows": [spread(column) for column in np.array([draw.mean(0) for draw in draws]).T],
        "spearman_of_means": spread([_spearman_of_means(draw) for draw in draws]),
        "monotonicity": spread([sure / count for sure, count in pairs]),
    }


def _level_columns(e: Evidence) -> Float64:
    return np.tile(np.arange(float(e.levels)), (len(e.samples), 1))


def _spearman_of_means(table: Float64) -> float:
    return spearman(np.arange(table.shape[1]), table.mean(0))
