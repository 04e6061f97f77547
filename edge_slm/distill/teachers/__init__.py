"""Teachers write the samples that a small model learns from.

    grammar       composes prompts from lexicons; nothing else is needed
    server        any OpenAI-compatible server: vLLM, llama.cpp, Ollama, …
    transformers  a Hugging Face model in this process

Samples written elsewhere need no teacher: `samples.read_samples` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edge_slm_runtime.errors import BadSetting

if TYPE_CHECKING:
    from edge_slm.distill.recipe import TeacherRecipe

Progress = Callable[[int, int], None]  # (done, total)


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


def make_teacher(recipe: TeacherRecipe, *, server: str | None, journal: Path | None) -> Teacher:
    """The teacher of a recipe.

    server: base address of an OpenAI-compatible server, for kind "server".
    journal: where its raw answers are kept. Raises BadSetting, DependencyMissing.
    """
    if recipe.kind == "grammar":
        from edge_slm.distill.teachers.grammar import GrammarTeacher

        return GrammarTeacher()
    if not recipe.model:
        raise BadSetting(f"teacher.model is empty, but teacher.kind is {recipe.kind!r}")
    raise NotImplementedError(server, journal)
