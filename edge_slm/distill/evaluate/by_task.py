"""Every set of answers, task by task: length, relevance, what it keeps and adds, faults."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_slm.distill.evaluate.evidence import Evidence, Texts
from edge_slm.distill.evaluate.faults import faults
from edge_slm.distill.evaluate.figures import added_words
from edge_slm_bench.metrics.quality import (
    Float64,
    bootstrap_mean,
    bootstrap_ratio,
    within_tolerance,
)
from edge_slm_runtime.command import count_words
from edge_slm_runtime.keywords import coverage

SHORT = 12  # words of a request whose content an answer of any usual length has room for


def figures_by_task(e: Evidence, texts: Texts) -> dict[str, Any]:
    """Task → its figures, of the tasks that `texts` has answers for; JSON-ready.

    reference_ratio: figure of the texts ÷ figure of the references to the same requests.
    """
    column = texts.column()
    given = np.array([text is not None for text in column])
    references = e.written["references"]
    scored = {name: (e.score(texts, name), e.score(references, name)) for name in e.scores.names}
    scored["added"] = (_added(e, texts), _added(e, references))
    hits = within_tolerance(references.words(), texts.words())
    found = {}
    for task, mask in e.tasks.items():
        at = np.flatnonzero(mask & given)
        if not at.size:
            continue
        samples = [e.samples[i] for i in at]
        answers = [column[i] or "" for i in at]
        kept = [
            coverage(sample.request, answer)
            for sample, answer in zip(samples, answers, strict=True)
            if count_words(sample.request) <= SHORT
        ]
        found[task] = {
            "n": len(at),
            "words_hit_rate": bootstrap_mean(hits[at]).as_dict(),
            "reference_ratio": {
                name: bootstrap_ratio(mine[at], theirs[at]).as_dict()
                for name, (mine, theirs) in scored.items()
            },
            "kept_short": bootstrap_mean(np.array(kept)).as_dict(),
            "faults": faults(samples, answers),
        }
    return found


def _added(e: Evidence, texts: Texts) -> Float64:
    return np.array(
        [
            [np.nan if text is None else added_words(sample.request, text)]
            for sample, text in zip(e.samples, texts.column(), strict=True)
        ],
        float,
    )
