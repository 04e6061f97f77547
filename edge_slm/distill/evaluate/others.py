"""The answers of other models to the evaluated requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_slm.distill.recipe import TeacherRecipe
from edge_slm.distill.samples import Sample, read_jsonl
from edge_slm.distill.teachers import Ask, Teacher, make_teacher
from edge_slm.progress import StageProgress
from edge_slm_runtime.cores import default_threads
from edge_slm_runtime.errors import DataError
from edge_slm_runtime.installed import installed_models


def answers_of(
    name: str,
    source: str,
    samples: Sequence[Sample],
    report: StageProgress,
    threads: int | None = None,
) -> dict[str, str]:
    """Request → text, each of about as many words as the reference.

    source: a JSONL file of answers, a bundle's folder, the name of an installed model, a language
    model's GGUF file, or the address of an OpenAI-compatible server, whose model is `name`; all
    but the JSONL file are asked, greedily. threads: of a GGUF file; None is one per core. Raises
    DataError, CheckpointError, TeacherError, DependencyMissing, and what `load` raises.
    """
    teacher = _teacher(name, source, threads or default_threads())
    if teacher is None:
        return _written(source, samples)
    asks = [Ask(s.task, s.request, words=s.words) for s in samples]
    answered = teacher.answer(asks, 1, lambda i, n: report(f"ask {name}", i, n, ""))
    return {ask.request: texts[0] for ask, texts in answered if texts}


def _teacher(name: str, source: str, threads: int) -> Teacher | None:
    """Who is asked, or None for a file of answers."""
    if source.startswith(("http://", "https://")):
        recipe = TeacherRecipe(kind="server", model=name, source="data", temperature=0)
        return make_teacher(recipe, server=source, journal=None)
    if source.endswith(".gguf"):
        from edge_slm.distill.teachers.llama_cpp import LlamaCppTeacher

        return LlamaCppTeacher(Path(source), 0, threads)
    if Path(source).is_dir() or source in installed_models():
        recipe = TeacherRecipe(kind="bundle", model=source, source="data", temperature=0)
        return make_teacher(recipe, server=None, journal=None)
    return None


def _written(source: str, samples: Sequence[Sample]) -> dict[str, str]:
    wanted = {(sample.task, sample.request) for sample in samples}
    texts = {
        folded: response
        for request, response, task, *_ in read_jsonl([source])
        if request and (task, folded := " ".join(request.split())) in wanted
    }
    if not texts:
        raise DataError(f"{source} answers none of the evaluated requests", "see --data")
    return texts
