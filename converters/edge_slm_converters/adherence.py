"""Does a variant still obey? Its own answers to commanded requests are compared with fp32's.

Two models that predict nearly the same may still write different texts, token upon token.
So every variant answers the same requests, greedily and without the length promise, and its
obedience to the commands is compared answer by answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from edge_slm_bench.metrics.quality import LEAST, within_tolerance
from edge_slm_converters.arrays import Float64
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_runtime.command import Command, count_words
from edge_slm_runtime.generate import SLM
from edge_slm_runtime.records import Request

LEVELLED = 16  # requests that are asked at every level of relevance
ROWS = 16  # answered together

# How much worse than fp32's a mean may be: shares of answers, a cosine, words.
ALLOWED = {"within": 0.05, "task_accuracy": 0.05, "relevance": 0.02, "length_mae": 0.5}


class AnswerJudge(Protocol):
    """Scores that need more than counting; implemented on a higher floor."""

    def relevance(self, requests: Sequence[str], texts: Sequence[str]) -> Float64:
        """How well each text goes with its request, higher is better."""

    def of_task(self, tasks: Sequence[str], texts: Sequence[str]) -> Float64:
        """1.0 where a text is of its task, else 0.0."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What one variant wrote: figure → a value per answer, nan where it does not apply.

    within: 1 in the tolerance of the words asked. length_mae: |asked − written| words.
    relevance and task_accuracy: the judge's. levels: the level asked, nan for none.
    requests: those asked; answers to one request are not independent.
    """

    values: Mapping[str, Float64]
    levels: Float64
    requests: Sequence[str]

    def figures(self) -> dict[str, float]:
        """Means; `relevance_L` is the relevance attained under level L."""
        means = {"answers": float(len(self.levels))}
        for name, values in self.values.items():
            if np.isfinite(values).any():
                means[name] = float(np.nanmean(values))
        if "relevance" in means:
            for level in np.unique(self.levels[np.isfinite(self.levels)]):
                attained = self.values["relevance"][self.levels == level]
                means[f"relevance_{level:.0f}"] = float(attained.mean())
        return means


def requests(
    source: Checkpoint, asked: Sequence[tuple[str, Command]], *, levelled: bool
) -> list[Request]:
    """Each request under its command; if `levelled`, the first ones at every level of
    relevance too. Requests for which the context has no room are left out."""
    schema = source.form.grammar
    levels = range(len(schema.axis("relevance").values) if levelled else 0)
    at_levels = [(text, replace(c, relevance=n)) for text, c in asked[:LEVELLED] for n in levels]
    fitting = []
    for text, command in [*asked, *at_levels]:
        prompt = source.codec.prompt(text, schema.check(command).commanded)
        # A model that has learnt nothing never ends by itself.
        tokens = min(source.decoder.positions - len(prompt), 2 * (command.words or 0) + 16)
        if tokens > 0:
            fitting.append(
                Request.of(text, **command.as_dict(), max_new_tokens=tokens, keep_length=False)
            )
    return fitting


def answer(slm: SLM, asked: Sequence[Request], judge: AnswerJudge | None) -> Answers:
    """A variant's answers to `asked`, and their scores."""
    texts = [out.text for out in slm.generate_batch(asked, ROWS)]
    words = np.array([request.words for request in asked], float)
    written = np.array([count_words(text) for text in texts], float)
    values = {
        "within": within_tolerance(words, written).astype(float),
        "length_mae": np.abs(words - written),
    }
    if judge:
        values["relevance"] = judge.relevance([request.request for request in asked], texts)
        values["task_accuracy"] = judge.of_task([r.task or "" for r in asked], texts)
    levels = [math.nan if r.relevance is None else r.relevance for r in asked]
    return Answers(values, np.array(levels, float), [request.request for request in asked])


def faults(reference: Answers, candidate: Answers) -> list[str]:
    """The figures of `candidate` that are outside ALLOWED by more than two standard errors of
    the paired difference, requests being the units."""
    faults = []
    _, request = np.unique(reference.requests, return_inverse=True)
    for name, allowed in ALLOWED.items():
        if name not in candidate.values:
            continue
        before, after = reference.values[name], candidate.values[name]
        lost = (after - before) * (1 if name == "length_mae" else -1)
        known = np.isfinite(lost)
        if len(np.unique(request[known])) < LEAST:
            continue
        mean = float(lost[known].mean())
        of_request = np.bincount(request[known], lost[known] - mean)
        error = math.sqrt(float(np.square(of_request).sum())) / int(known.sum())
        if mean - 2 * error > allowed:
            faults.append(
                f"{name} {np.nanmean(after):.3f} against {np.nanmean(before):.3f} "
                f"(at most {allowed} worse)"
            )
    return faults
