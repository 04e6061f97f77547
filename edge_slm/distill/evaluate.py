"""Does the model obey? Held-out requests under commanded lengths and relevance levels.

Length: every request at every commanded length, with the model alone and with
the length promise. Relevance: every request at every level, at the reference's
own length, against the written reference as the teacher's figure. The scorer is
the training reward's encoder in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_slm.distill.prepare import Report, silent
from edge_slm.distill.rewards import Relevance
from edge_slm.distill.samples import Sample
from edge_slm_bench.quality import copied_words, distinct, length_adherence, spearman
from edge_slm_runtime.command import RELEVANCE_LEVELS
from edge_slm_runtime.errors import DataError, RequestTooLong

if TYPE_CHECKING:
    from edge_slm_runtime import SLM, Generation

LENGTHS = (16, 24, 32, 48, 64)


def evaluate(
    slm: SLM,
    samples: Sequence[Sample],
    *,
    lengths: Sequence[int] = LENGTHS,
    report: Report = silent,
) -> dict[str, Any]:
    """The report as JSON-ready data: `length`, `relevance`, `teacher`, `ratio`, `texts`.

    Samples that the context has no room for at one of the lengths are left out and
    counted as `too_long`. Raises DataError when fewer than two are left.
    """
    from edge_slm_runtime import Request

    top = RELEVANCE_LEVELS - 1
    reward = Relevance()
    reward.embed(["a scorer that is missing is told before the work, not after"])

    def fits(sample: Sample) -> bool:
        try:
            for words in (*lengths, sample.words):
                slm.check(Request(sample.request, task=sample.task, words=words))
        except RequestTooLong:
            return False
        return True

    given, samples = len(samples), [sample for sample in samples if fits(sample)]
    if len(samples) < 2:
        raise DataError(f"{len(samples)} held-out requests are too few", "give more data")

    def run(stage: str, requests: list[Request]) -> list[Generation]:
        done = []
        for i, out in enumerate(slm.generate_batch(requests), 1):
            done.append(out)
            report(stage, i, len(requests), "")
        return done

    length: dict[str, Any] = {}
    for name, keep in (("model alone", False), ("with the promise", True)):
        achieved = {
            words: [
                out.words
                for out in run(
                    f"{words} words, {name}",
                    [
                        Request(
                            s.request, task=s.task, words=words, relevance=top, keep_length=keep
                        )
                        for s in samples
                    ],
                )
            ]
            for words in lengths
        }
        length[name] = {
            **asdict(
                length_adherence(
                    [words for words in lengths for _ in samples],
                    [got for words in lengths for got in achieved[words]],
                )
            ),
            "by_length": {
                words: asdict(length_adherence([words] * len(samples), achieved[words]))
                for words in lengths
            },
        }

    levels: list[dict[str, Any]] = []
    kept: list[list[Generation]] = []
    for level in (*range(RELEVANCE_LEVELS), None):
        outs = run(
            f"relevance {'any' if level is None else level}",
            [Request(s.request, task=s.task, words=s.words, relevance=level) for s in samples],
        )
        kept.append(outs)
        scores = reward.score([Sample(o.request, o.text or ".", "") for o in outs])
        levels.append(
            {
                "level": level,
                "relevance": float(scores.mean()),
                "standard_error": float(scores.std(ddof=1) / np.sqrt(len(scores))),
                "distinct_2": distinct([o.text for o in outs]),
                "request_words_kept": copied_words(
                    [o.request for o in outs], [o.text for o in outs]
                ),
            }
        )
    teacher_scores = reward.score(samples)
    teacher = {
        "relevance": float(teacher_scores.mean()),
        "standard_error": float(teacher_scores.std(ddof=1) / np.sqrt(len(samples))),
        "distinct_2": distinct([s.response for s in samples]),
        "request_words_kept": copied_words(
            [s.request for s in samples], [s.response for s in samples]
        ),
    }
    numbered = [row for row in levels if row["level"] is not None]
    return {
        "requests": len(samples),
        "too_long": given - len(samples),
        "tasks": sorted({s.task for s in samples}),
        "variant": slm.variant.name,
        "length": length,
        "relevance": levels,
        "relevance_spearman": spearman(
            [row["level"] for row in numbered], [row["relevance"] for row in numbered]
        ),
        "teacher": teacher,
        "ratio": levels[top]["relevance"] / teacher["relevance"],
        "texts": [
            {"task": s.task, "request": s.request, "words": s.words, "text": o.text}
            for s, o in zip(samples, kept[top], strict=True)
        ],
    }
