"""Teachers write the samples that a small model learns from.

    grammar       composes prompts from lexicons; nothing else is needed
    server        any OpenAI-compatible server: vLLM, llama.cpp, Ollama, …
    transformers  a Hugging Face model in this process

Samples written elsewhere need no teacher: `samples.read_samples` reads them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edge_slm.journal import Journal
from edge_slm_runtime.errors import BadSetting, TeacherError
from edge_slm_runtime.files import write_jsonl

if TYPE_CHECKING:
    from edge_slm.distill.prepare import Report
    from edge_slm.distill.recipe import TeacherRecipe

Progress = Callable[[int, int], None]  # (done, total)
BATCH = 16  # asks that a teacher may answer together, counted from the first one


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to answer. words: length to aim at; None: the teacher varies it."""

    task: str
    request: str
    words: int | None = None
    seed: int = 0


class Teacher(Protocol):
    """Deterministic by seed where its engine is."""

    name: str  # the "source" of its samples

    def invent(self, task: str, count: int, seed: int) -> list[str]:
        """Up to `count` distinct requests that a user might make."""
        ...

    def answer(
        self, asks: Sequence[Ask], candidates: int, progress: Progress | None = None
    ) -> Iterator[tuple[Ask, list[str]]]:
        """Every ask, in order, with up to `candidates` distinct texts."""
        ...


def make_teacher(
    recipe: TeacherRecipe,
    *,
    server: str | None,
    journal: Path | None,
    concurrency: int = 8,
    requests_per_minute: float | None = None,
) -> Teacher:
    """The teacher of a recipe.

    For kind "server": server is the base address of an OpenAI-compatible one, journal
    where its raw answers are kept, concurrency how many requests are under way.
    Raises BadSetting, DependencyMissing, TeacherError (a model that cannot be loaded).
    """
    if recipe.kind == "grammar":
        from edge_slm.distill.teachers.grammar import GrammarTeacher

        return GrammarTeacher()
    if not recipe.model:
        raise BadSetting(f"teacher.kind {recipe.kind!r} needs teacher.model", "name it")
    if recipe.kind == "transformers":
        from edge_slm.distill.teachers.local import LocalTeacher

        return LocalTeacher(recipe.model, recipe.temperature)
    if not server:
        raise BadSetting(
            "a teacher of kind 'server' needs the server's address",
            "give something like http://127.0.0.1:8000/v1",
        )
    from edge_slm.distill.chat import Chat
    from edge_slm.distill.teachers.server import ServerTeacher

    chat = Chat(
        server,
        recipe.model,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        journal=journal,
    )
    return ServerTeacher(chat, recipe.temperature)


def teach(
    teacher: Teacher,
    tasks: Sequence[str],
    recipe: TeacherRecipe,
    out: Path,
    seed: int,
    report: Report,
    requests: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Writes `out`: JSONL of {"request", "response", "task", "source"}.

    requests: what to answer, per task, a random choice where there are more than
    `recipe.requests`; those of a task that is not in it are invented. A stopped run
    goes on where it was (`out`.journal, removed at the end), to the same bytes if the
    teacher is deterministic. A complete `out` is kept. Raises TeacherError, and
    DataError when the journal was begun with something else.
    """
    if out.exists():
        return out
    given = {task: list(dict.fromkeys(found)) for task, found in (requests or {}).items()}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    begun = {
        "teacher": teacher.name,
        "recipe": recipe.model_dump(mode="json"),
        "tasks": list(tasks),
        "seed": seed,
        "requests_digest": digest,
    }
    path = out.with_name(out.name + ".journal")
    samples: list[dict[str, str]] = []
    with Journal(path) as journal:
        journal.begin(begun)
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
    write_jsonl(samples, out)
    path.unlink()
    return out


def _invented(
    teacher: Teacher, task: str, count: int, seed: int, *, journal: Journal, report: Report
) -> list[str]:
    for row in journal.rows():
        if row.get("task") == task and "invented" in row:
            return list(row["invented"])
    report("invent", 0, count, task)
    found = list(dict.fromkeys(teacher.invent(task, count, seed)))
    journal.append({"task": task, "invented": found})
    report("invent", len(found), count, task)
    return found


def _answers(
    teacher: Teacher, asks: Sequence[Ask], candidates: int, journal: Journal, report: Report
) -> dict[str, list[str]]:
    """Texts by request; what the journal holds in whole batches is not asked again."""
    texts: dict[str, list[str]] = {
        row["request"]: row["texts"]
        for row in journal.rows()
        if "texts" in row and asks and row["task"] == asks[0].task
    }
    done = len(texts) // BATCH * BATCH if len(texts) < len(asks) else len(asks)
    for ask, found in teacher.answer(asks[done:], candidates):
        texts[ask.request] = found
        journal.append({"task": ask.task, "request": ask.request, "texts": found})
        done += 1
        report("teach", done, len(asks), ask.task)
    return texts
