"""The forms of answers: OpenAI's two, and our own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from edge_slm.serve.bodies import Asked
from edge_slm_runtime import Generation


class Form(Protocol):
    """The JSON of an answer, and of the events that stream it."""

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """An event before the first piece of answer `index`."""

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """An event with the next text of answer `index`."""

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        """The last event of answer `index`."""

    def closing(self, results: Sequence[Generation]) -> dict[str, Any] | None:
        """An event after all answers."""


class Prompts:
    """Our own: the fields of `Generation.as_dict`."""

    def __init__(self, model: str, asked: Asked) -> None:
        self._model, self._asked = model, asked

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        return {"model": self._model, "prompts": [self._prompt(result) for result in results]}

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text}

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        return {"index": index, "prompt": self._prompt(result)}

    def closing(self, results: Sequence[Generation]) -> None:
        return None

    def _prompt(self, result: Generation) -> dict[str, Any]:
        fields = result.as_dict()
        return fields | {"warnings": [*fields["warnings"], *self._asked.warnings]}


class Completion:
    """OpenAI's completions. Each choice has a key `edge_slm` with what OpenAI has no field for."""

    prefix, kind, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, asked: Asked) -> None:
        self._asked = asked
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        choices = [
            self._choice(i, self._text(result.text), result) for i, result in enumerate(results)
        ]
        return self._body(self.kind, choices) | {"usage": _usage(results)}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return self._body(self.part, [self._choice(index, self._delta(text))])

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        return self._body(self.part, [self._choice(index, self._delta(""), result)])

    def closing(self, results: Sequence[Generation]) -> dict[str, Any] | None:
        if not self._asked.usage:
            return None
        return self._body(self.part, []) | {"usage": _usage(results)}

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    def _choice(
        self, index: int, text: dict[str, Any], result: Generation | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **text, "logprobs": None, "finish_reason": None}
        if result is None:
            return choice
        ended = result.finish_reason in ("stop", "stop_sequence")
        ours = {
            "finish_reason": result.finish_reason,
            "words": result.words,
            "in_tolerance": result.in_tolerance,
            "asked": asdict(result.asked),
            "commanded": asdict(result.commanded),
            "seed": result.seed,
            "score": result.score,
            "confidence": result.confidence,
            "logprobs": result.logprobs,
            "warnings": [*result.warnings, *self._asked.warnings],
            "stats": asdict(result.stats),
        }
        return choice | {"finish_reason": "stop" if ended else "length", "edge_slm": ours}


class Chat(Completion):
    """OpenAI's chat completions."""

    prefix, kind, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        return self._body(self.part, [self._choice(index, delta)])

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def _usage(results: Sequence[Generation]) -> dict[str, Any]:
    prompt = sum(result.stats.prompt_tokens for result in results)
    new = sum(result.stats.new_tokens for result in results)
    cached = sum(result.stats.cached_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
