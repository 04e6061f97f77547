"""What the body of a request asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from edge_slm_runtime import Generation, Request
from edge_slm_runtime.command import is_count
from edge_slm_runtime.errors import BadSetting, EmptyRequest, RequestNotText, shown
from edge_slm_runtime.ranking import candidates
from edge_slm_runtime.variations import TEMPERATURE

CHOICES_MAX = 16  # answers to one HTTP request
SETTINGS = {one.name for one in fields(Request)} - {"request"}
_RENAMED = {  # OpenAI's names of our settings
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "user": "cache_key",
}
_OURS = {"model", "n", "stream", "stream_options", "metadata"}
# OpenAI's fields that we do not have, with the values that ask for nothing.
_NOTHING: dict[str, tuple[object, ...]] = {
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """requests: one for each answer that is computed. n, best_of: answers to a text, and those
    that they are chosen from. warnings: of what was not read."""

    requests: list[Request]
    n: int
    best_of: int
    stream: bool
    usage: bool
    warnings: tuple[str, ...] = ()

    def best(self, results: Sequence[Generation]) -> list[Generation]:
        """Of the answers to each text the n best, the best first where they were chosen."""
        if self.best_of == self.n:
            return [*results]
        groups = (results[at : at + self.best_of] for at in range(0, len(results), self.best_of))
        ranked = (sorted(one, key=lambda each: each.score or 0.0, reverse=True) for one in groups)
        return [each for one in ranked for each in one[: self.n]]


def prompts_body(body: Mapping[str, Any]) -> Asked:
    """Of /v1/prompts. Raises RequestError."""
    return _asked(body, "request", [_text(body.get("request"), "request")])


def completion_body(body: Mapping[str, Any]) -> Asked:
    """Of /v1/completions. Raises RequestError."""
    given = body.get("prompt")
    prompts = given if isinstance(given, list) else [given]
    return _asked(body, "prompt", [_text(one, "prompt") for one in prompts])


def chat_body(body: Mapping[str, Any]) -> Asked:
    """Of /v1/chat/completions: the request is the last message, which must be the user's, since
    models of this kind are asked once. Raises RequestError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise BadSetting("messages is not a list of messages")
    if not messages or messages[-1].get("role") != "user":
        raise EmptyRequest("the last message is not the user's", "put the request there")
    content = messages[-1].get("content")
    if isinstance(content, list):
        content = "".join(_text(part.get("text"), "content") for part in content)
    unread = len(messages) - 1
    warning = f"{unread} earlier messages were not read: the model is asked once"
    return _asked(body, "messages", [_text(content, "content")], (warning,) if unread else ())


def _asked(
    body: Mapping[str, Any], source: str, texts: list[str], warnings: tuple[str, ...] = ()
) -> Asked:
    settings = dict(_metadata(body.get("metadata")))
    for name, value in body.items():
        if value is None or name in _OURS or name == source:
            continue
        if name in SETTINGS or name in _RENAMED:
            settings[_RENAMED.get(name, name)] = value
        elif name not in _NOTHING:
            raise BadSetting(f"there is no field {name!r}", "leave it out")
        elif value not in _NOTHING[name]:
            raise BadSetting(f"{name} is {shown(value)}", "it is not supported: leave it out")
    count = body.get("n")
    count = 1 if count is None else count
    if not is_count(count) or not 1 <= count * len(texts) <= CHOICES_MAX:
        raise BadSetting(f"n is {shown(count)}", f"allowed: 1 … {CHOICES_MAX} answers in all")
    best_of = settings.pop("best_of", count)
    if not is_count(best_of) or not count <= best_of <= CHOICES_MAX // len(texts):
        told = f"allowed: n … {CHOICES_MAX} answers in all"
        raise BadSetting(f"best_of is {shown(best_of)}", told)
    options = body.get("stream_options") or {}
    usage = isinstance(options, dict) and options.get("include_usage") is True
    stream = _flag(body, "stream")
    if best_of > count:
        if stream:
            raise BadSetting("best_of is above n in a stream", "leave one out")
        asked = [Request(text, **settings, best_of=best_of) for text in texts]
        requests = [one for text in asked for one in candidates(text)]
        return Asked(requests, count, best_of, stream, usage, warnings)
    if count > 1 and not settings.get("temperature"):
        settings["temperature"] = TEMPERATURE
        told = f"temperature 0 has one answer; {count} were drawn at {TEMPERATURE}"
        warnings = (*warnings, told)
    requests = [_request(text, settings, number) for text in texts for number in range(count)]
    return Asked(requests, count, count, stream, usage, warnings)


def _request(text: str, settings: Mapping[str, Any], number: int) -> Request:
    """The one for answer `number` to a text, each with a seed of its own."""
    seed: Any = settings.get("seed")
    if number and is_count(seed):
        return Request(text, **{**settings, "seed": (seed + number) % (1 << 64)})
    return Request(text, **settings)


def _metadata(given: object) -> dict[str, Any]:
    """Settings that a client which allows no fields of ours puts there, as texts."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise BadSetting(f"metadata is {shown(given)}", "allowed: an object")
    found = {name: value for name, value in given.items() if name in SETTINGS}
    for name, value in found.items():
        if isinstance(value, str) and name not in ("task", "cache_key", "stop", "adapter"):
            try:
                found[name] = json.loads(value)
            except ValueError:
                raise BadSetting(
                    f"metadata.{name} is {shown(value)}", "a number is meant"
                ) from None
    return found


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadSetting(f"{name} is {shown(value)}", "allowed: true or false")
    return bool(value)


def _text(value: object, name: str) -> str:
    if value is None:
        raise EmptyRequest(f"{name} is missing", "it is the text to expand")
    if not isinstance(value, str):
        raise RequestNotText(f"{name} is {shown(value)}", "a text is meant")
    return value
