"""Plug-in of the command line tool `llm` (https://llm.datasette.io): `llm -m edge-slm …`.

The shipped bundle is the model `edge-slm`, an installed model NAME is `edge-slm/NAME`. A
bundle is loaded at its first prompt and kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import llm
from pydantic import Field

import edge_slm
from edge_slm import SLM, EdgeSlmError, Stream

_END = object()


class Options(llm.Options):  # type: ignore[misc]  # llm is untyped
    """What `-o` sets; the runtime checks the values."""

    task: str | None = Field(None, description="Kind of prompt: image, video, tags …")
    words: int | None = Field(None, description="Length in words")
    relevance: int | None = Field(None, description="Relevance level, 0 the least")
    temperature: float = Field(0.0, description="0 takes the likeliest token")
    seed: int | None = Field(None, description="Of the draws; needs a temperature")


class _EdgeSLM:
    """What the two models share. bundle: None is the shipped one."""

    can_stream = True
    Options = Options

    def __init__(self, bundle: str | None) -> None:
        self.model_id = f"edge-slm/{bundle}" if bundle else "edge-slm"
        self._bundle = bundle

    def _stream(self, prompt: Any) -> Stream:
        if prompt.system:
            raise llm.ModelError(f"{self.model_id} reads no system prompt")
        return _loaded(self._bundle).stream(prompt.prompt or "", **prompt.options.model_dump())


class EdgeSLM(_EdgeSLM, llm.Model):  # type: ignore[misc]
    """A bundle as a model of llm."""

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """Raises llm.ModelError for whatever the runtime refuses."""
        with _model_errors():
            answer = self._stream(prompt)
            try:
                yield from answer
            finally:
                answer.close()
            _note(answer, response)


class AsyncEdgeSLM(_EdgeSLM, llm.AsyncModel):  # type: ignore[misc]
    """The same for asyncio: each piece is computed in a worker thread."""

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any
    ) -> AsyncGenerator[str, None]:
        """Raises llm.ModelError for whatever the runtime refuses."""
        with _model_errors():
            answer = await asyncio.to_thread(self._stream, prompt)
            try:
                while (piece := await asyncio.to_thread(next, answer, _END)) is not _END:
                    yield str(piece)
            finally:
                answer.close()
            _note(answer, response)


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Callable[..., None]) -> None:
    """The shipped bundle and the installed models."""
    for bundle in (None, *edge_slm.installed_models()):
        register(EdgeSLM(bundle), AsyncEdgeSLM(bundle))


@cache
def _loaded(bundle: str | None) -> SLM:
    return edge_slm.load(bundle)


@contextmanager
def _model_errors() -> Iterator[None]:
    try:
        yield
    except EdgeSlmError as error:
        raise llm.ModelError(str(error)) from error


def _note(answer: Stream, response: Any) -> None:
    """What `llm logs` keeps of an answer beside its text."""
    result = answer.result
    response.set_usage(input=result.stats.prompt_tokens, output=result.stats.new_tokens)
    response.response_json = {
        "words": result.words,
        "finish_reason": result.finish_reason,
        "warnings": list(result.warnings),
    }
