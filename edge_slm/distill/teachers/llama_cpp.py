"""A language model in a GGUF file as a teacher, run by llama.cpp (the package xllamacpp).

A file with a chat template is asked in chat; any other gets the few-shot prompt as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edge_slm.distill.teachers.base import Ask
from edge_slm.distill.teachers.few_shot import (
    answer_messages,
    completion,
    length,
    max_tokens,
    usable,
)
from edge_slm.progress import Progress
from edge_slm_converters.gguf_reader import read_metadata
from edge_slm_runtime.errors import BadSetting, DependencyMissing, TeacherError

_CONTEXT = 4096  # tokens, at most: a few-shot prompt and its answer need about a quarter


class LlamaCppTeacher:
    """Answers the requests of the data one after the other; it invents none.

    threads: on a busy machine fewer than its cores, because llama.cpp's threads wait actively.
    Raises CheckpointError (not a GGUF file), DependencyMissing, TeacherError.
    """

    def __init__(self, file: Path, temperature: float, threads: int) -> None:
        metadata = read_metadata(file)
        try:
            import xllamacpp
        except ImportError:
            raise DependencyMissing(
                "asking a GGUF file needs xllamacpp", "pip install 'xllamacpp>=2026.10'"
            ) from None
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = min(metadata.integer("context_length", _CONTEXT), _CONTEXT)
        settings.n_parallel, settings.n_gpu_layers = 1, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.warmup, settings.verbosity = False, 0
        try:
            self._server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise TeacherError(f"llama.cpp cannot load {file}: {error}") from None
        self._chats = "tokenizer.chat_template" in metadata.values
        self._temperature = temperature
        self.name = f"llama.cpp:{file.stem}"

    def invent(self, task: str, count: int, seed: int) -> list[str]:
        """Raises BadSetting."""
        raise BadSetting("a GGUF file invents no requests", "set teacher.source = 'data'")

    def answer(
        self, asks: Sequence[Ask], candidates: int, progress: Progress | None = None
    ) -> Iterator[tuple[Ask, list[str]]]:
        """Every ask, in order, with up to `candidates` distinct texts. Raises TeacherError."""
        for done, ask in enumerate(asks, 1):
            yield ask, usable([self._answer(ask, i) for i in range(candidates)])
            if progress is not None:
                progress(done, len(asks))

    def _answer(self, ask: Ask, candidate: int) -> tuple[str, bool]:
        """The text, and whether it reached its token limit."""
        words = length(ask, candidate)
        messages = answer_messages(ask, words)
        body: dict[str, Any] = {
            "temperature": self._temperature,
            "seed": ask.seed + candidate,
            "max_tokens": max_tokens(words),
        }
        if self._chats:
            body["messages"] = [{"role": role, "content": text} for role, text in messages]
            answer = self._server.handle_chat_completions(body)
        else:
            body |= {"prompt": completion(messages), "stop": ["\n\n"]}
            answer = self._server.handle_completions(body)
        if error := answer.get("error"):
            raise TeacherError(f"llama.cpp: {error.get('message', error)}")
        (choice,) = answer["choices"]
        text = choice["message"]["content"] if self._chats else choice["text"]
        return text or "", choice["finish_reason"] == "length"
