"""Teachers write the samples that a small model learns from.

    grammar       composes prompts from lexicons, without a model
    bundle        a bundle of ours, run by our own engines
    server        any OpenAI-compatible server: vLLM, llama.cpp, Ollama, …
    transformers  a Hugging Face model in this process

Samples written elsewhere need no teacher: `samples.read_samples` reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_slm.distill.teachers.base import BATCH, Ask, Teacher
from edge_slm.distill.teachers.teach import teach
from edge_slm_runtime.errors import BadSetting

if TYPE_CHECKING:
    from edge_slm.distill.recipe import TeacherRecipe

__all__ = ["BATCH", "Ask", "Teacher", "make_teacher", "teach"]


def make_teacher(
    recipe: TeacherRecipe,
    *,
    server: str | None,
    journal: Path | None,
    concurrency: int = 8,
    requests_per_minute: float | None = None,
) -> Teacher:
    """The teacher of a recipe.

    Of kind "server": server is the base address of an OpenAI-compatible server, journal
    the file of its raw answers, concurrency the number of requests at a time. Raises
    BadSetting, DependencyMissing, TeacherError (a model that cannot be loaded).
    """
    if recipe.kind == "grammar":
        from edge_slm.distill.teachers.grammar import GrammarTeacher

        return GrammarTeacher()
    if not recipe.model:
        raise BadSetting(f"teacher.kind {recipe.kind!r} needs teacher.model", "name it")
    if recipe.kind == "bundle":
        from edge_slm.distill.teachers.bundle import BundleTeacher

        return BundleTeacher(recipe.model, recipe.temperature)
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
