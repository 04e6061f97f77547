"""The grid of generations for all figures: each request under many commands.

Greedy and by the model alone, except where a block says otherwise. A request that two
figures need is generated once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_slm.distill.samples import Sample
from edge_slm.progress import StageProgress
from edge_slm_runtime import SLM, Generation, Request
from edge_slm_runtime.command import Axis
from edge_slm_runtime.errors import RequestTooLong

LENGTHS = (4, 8, 12, 16, 24, 32, 48, 64)  # words; of these, the supported ones of a task
BATCH = 16
TEMPERATURE = 0.7  # of best-of-n; at 1, samples of a small model are worse than greedy

Block = list[list[Request | None]]  # [samples][commands]; None: not asked


@dataclass(frozen=True, slots=True)
class Grid:
    """Requests to the model about `samples`, in blocks; a column is one command.

    lengths, kept: every length of `words` at the highest level, without and with the length
    promise. levels: every level, then none, at the length of the reference. own, shuffled,
    bare: words and level of the reference as the command, those of another request of the
    task, no command. candidates: those of best-of-n. tasks: every task of `task_words`, at
    its usual length.
    """

    samples: list[Sample]
    words: tuple[int, ...]
    too_long: int
    blocks: dict[str, Block]


def build_grid(
    slm: SLM,
    samples: Sequence[Sample],
    *,
    own_levels: Sequence[int],
    lengths: Sequence[int],
    task_words: Mapping[str, int],
    best_of: int,
) -> Grid:
    """own_levels: achieved by the references. task_words: task → its usual length.

    Samples that do not fit the context under one of the commands are left out and counted.
    Raises UnknownTask for a sample of a task that the model does not have.
    """
    top = slm.schema.levels - 1
    supported = {task: _supported(slm, task, lengths) for task in {s.task for s in samples}}

    def row(s: Sample, level: int) -> dict[str, list[Request | None]]:
        def asked(words: int, level: int | None = top, keep: bool = False) -> Request:
            return Request(s.request, s.task, words, level, keep_length=keep)

        by_length = [w if w in supported[s.task] else None for w in lengths]
        return {
            "lengths": [asked(w) if w else None for w in by_length],
            "kept": [asked(w, keep=True) if w else None for w in by_length],
            "levels": [asked(s.words, at) for at in (*range(top + 1), None)],
            "own": [asked(s.words, level)],
            "bare": [Request(s.request, keep_length=False)],
            "tasks": [
                Request(s.request, task, words, top, keep_length=False)
                for task, words in task_words.items()
            ],
            "candidates": [
                Request(
                    s.request, s.task, s.words, temperature=TEMPERATURE, seed=i, keep_length=False
                )
                for i in range(best_of)
            ],
        }

    rows = [row(s, level) for s, level in zip(samples, own_levels, strict=True)]
    fits = [all(_fits(slm, r) for block in row.values() for r in block) for row in rows]
    chosen = [i for i, ok in enumerate(fits) if ok]
    kept = [samples[i] for i in chosen]
    blocks = {name: [rows[i][name] for i in chosen] for name in (rows[0] if rows else ())}
    blocks["shuffled"] = []
    for s, other in zip(kept, _partners(kept), strict=True):
        words, level = kept[other].words, own_levels[chosen[other]]
        request = Request(s.request, s.task, words, level, keep_length=False)
        blocks["shuffled"].append([request if _fits(slm, request) else None])
    return Grid(kept, tuple(lengths), len(samples) - len(kept), blocks)


def generate(
    slm: SLM, requests: Iterable[Request | None], stage: str, report: StageProgress
) -> dict[Request, Generation]:
    """One answer per distinct request."""
    todo = list(dict.fromkeys(request for request in requests if request is not None))
    # Long answers first, so that batches stay full.
    todo.sort(key=lambda request: request.words or 0, reverse=True)
    answers = {}
    for i, (request, out) in enumerate(zip(todo, slm.generate_batch(todo, BATCH), strict=True), 1):
        answers[request] = out
        report(stage, i, len(todo), "")
    return answers


def answers_at_top(slm: SLM, samples: Sequence[Sample], report: StageProgress) -> dict[Sample, str]:
    """What a user gets: the answers with the promise, at the highest level and the references'
    lengths; without the samples that do not fit the context."""
    top = slm.schema.levels - 1
    asked = {s: Request(s.request, s.task, s.words, top) for s in samples}
    asked = {sample: request for sample, request in asked.items() if _fits(slm, request)}
    outs = generate(slm, asked.values(), "generate", report)
    return {sample: outs[request].text for sample, request in asked.items()}


def _supported(slm: SLM, task: str, lengths: Sequence[int]) -> set[int]:
    """The lengths in the training data of the task; all, if the bundle does not list them."""
    axis: Axis = slm.schema.axis("words")
    seen = slm.schema.support.get(task, {}).get("words")
    if seen is None:
        return set(lengths)
    return {w for w in lengths if seen.get(axis.value_of(w), 0) >= slm.schema.min_support}


def _fits(slm: SLM, request: Request | None) -> bool:
    try:
        if request is not None:
            slm.check(request)
    except RequestTooLong:
        return False
    return True


def _partners(samples: Sequence[Sample]) -> list[int]:
    """For each sample another one of its task, or itself if there is none."""
    partners = list(range(len(samples)))
    rng = np.random.default_rng(0)
    for task in sorted({s.task for s in samples}):
        members = rng.permutation([i for i, s in enumerate(samples) if s.task == task])
        for one, other in zip(members, np.roll(members, 1), strict=True):
            partners[one] = int(other)
    return partners
