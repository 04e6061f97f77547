"""The teacher's part of a run: requests, answers, and a file of samples."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_slm.distill.rewards.base import Reward
from edge_slm.distill.samples import Sample
from edge_slm.distill.teachers.base import BATCH, Ask, Teacher
from edge_slm.journal import Journal
from edge_slm.progress import StageProgress
from edge_slm_runtime.errors import TeacherError
from edge_slm_runtime.files import write_jsonl

if TYPE_CHECKING:
    from edge_slm.distill.recipe import TeacherRecipe


def teach(
    teacher: Teacher,
    tasks: Sequence[str],
    recipe: TeacherRecipe,
    out: Path,
    seed: int,
    report: StageProgress,
    requests: Mapping[str, Sequence[str]] | None = None,
    reward: Reward | None = None,
) -> Path:
    """Writes `out`: JSONL of {"request", "response", "task", "source"}.

    requests: those to answer, by task; a random choice where there are more than
    `recipe.requests`. Those of a task that is not in it are invented. A stopped run
    continues where it was (`out`.journal, removed at the end), to the same bytes if the
    teacher is deterministic. A complete `out` is kept. reward: with it, only the
    `recipe.keep` best answers to each request are kept. Raises TeacherError, and
    DataError when the journal was begun with other arguments.
    """
    if out.exists():
        return out
    given = {task: list(dict.fromkeys(texts)) for task, texts in (requests or {}).items()}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    arguments = {
        "teacher": teacher.name,
        "recipe": recipe.model_dump(mode="json"),
        "tasks": list(tasks),
        "seed": seed,
        "requests_digest": digest,
    }
    path = out.with_name(out.name + ".journal")
    samples: list[dict[str, str]] = []
    with Journal(path) as journal:
        journal.begin(arguments)
        for task in tasks:
            wanted = given.get(task)
            if wanted is None:
                wanted = _invented(
                    teacher, task, recipe.requests, seed, journal=journal, report=report
                )
            elif len(wanted) > recipe.requests:
                wanted = random.Random(f"{seed}/{task}").sample(wanted, recipe.requests)
            asks = [
                Ask(task, request, seed=seed + i * recipe.candidates)
                for i, request in enumerate(wanted)
            ]
            texts = _answers(teacher, asks, recipe.candidates, journal, report)
            before = len(samples)
            samples += [
                {"request": a.request, "response": t, "task": task, "source": teacher.name}
                for a in asks
                for t in texts[a.request]
            ]
            if len(samples) == before:
                raise TeacherError(
                    f"{teacher.name} wrote nothing usable for task {task}",
                    f"see its answers in {path}, and whether the model follows instructions",
                )
    if reward is not None and recipe.keep:
        samples = _best(samples, reward, recipe.keep, report)
    write_jsonl(samples, out)
    path.unlink()
    return out


def _invented(
    teacher: Teacher, task: str, count: int, seed: int, *, journal: Journal, report: StageProgress
) -> list[str]:
    for row in journal.rows():
        if row.get("task") == task and "invented" in row:
            return list(row["invented"])
    report("invent", 0, count, task)
    invented = list(dict.fromkeys(teacher.invent(task, count, seed)))
    journal.append({"task": task, "invented": invented})
    report("invent", len(invented), count, task)
    return invented


def _answers(
    teacher: Teacher, asks: Sequence[Ask], candidates: int, journal: Journal, report: StageProgress
) -> dict[str, list[str]]:
    """Texts by request; whole batches in the journal are not asked for again."""
    texts: dict[str, list[str]] = {
        row["request"]: row["texts"]
        for row in journal.rows()
        if "texts" in row and asks and row["task"] == asks[0].task
    }
    done = len(texts) // BATCH * BATCH if len(texts) < len(asks) else len(asks)
    for ask, answers in teacher.answer(asks[done:], candidates):
        texts[ask.request] = answers
        journal.append({"task": ask.task, "request": ask.request, "texts": answers})
        done += 1
        report("teach", done, len(asks), ask.task)
    return texts


def _best(
    samples: Sequence[dict[str, str]], reward: Reward, keep: int, report: StageProgress
) -> list[dict[str, str]]:
    """The `keep` samples of each request and task with the highest reward, in their order."""
    scores = reward.score(
        [Sample(s["request"], s["response"], s["task"]) for s in samples],
        lambda done, total: report("score answers", done, total, ""),
    )
    ranked = sorted(range(len(samples)), key=lambda i: -scores[i])
    taken: Counter[tuple[str, str]] = Counter()
    chosen = []
    for i in ranked:
        key = samples[i]["task"], samples[i]["request"]
        taken[key] += 1
        if taken[key] <= keep:
            chosen.append(i)
    return [samples[i] for i in sorted(chosen)]
