"""Few-shot prompts for a teacher LLM, and what is left of its answers.

The texts are data: edge_slm/data/teacher/tasks/<task>.toml holds what the task is,
its usual lengths in words, examples, and ideas; default.toml serves any other task.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from edge_slm.distill.samples import clause_cuts
from edge_slm.distill.teachers import Ask
from edge_slm_runtime.command import clean_request, count_words
from edge_slm_runtime.errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from importlib.abc import Traversable  # Python 3.10's place of it

# (role, content) pairs. There is no system role: several models' templates refuse it.
Messages = tuple[tuple[str, str], ...]

IDEAS_PER_PROMPT = 20
_SHOWN_IDEAS = 6
_LONGEST_IDEA = 40  # words
_RULES = (
    "Keep everything that the request says; add what is missing, so that it fits. "
    "Answer with the text alone, on one line: no introduction, no quotation marks around it, "
    "no explanation after it. Keep to the length asked for."
)


@dataclass(frozen=True)
class TaskPrompt:
    """words: the usual (least, most). examples: (request, response) pairs."""

    what: str
    words: tuple[int, int]
    examples: tuple[tuple[str, str], ...]
    ideas: tuple[str, ...]


@lru_cache
def task_prompt(task: str) -> TaskPrompt:
    """The texts of a task; of default.toml where it has none."""
    folder = files("edge_slm") / "data" / "teacher" / "tasks"
    file = folder / f"{task}.toml"
    data = _toml(file if file.is_file() else folder / "default.toml")
    return TaskPrompt(
        " ".join(data["what"].split()).replace("{task}", task),
        (data["words"][0], data["words"][1]),
        tuple((example["request"], example["response"]) for example in data["examples"]),
        tuple(data["ideas"]),
    )


@lru_cache
def _themes() -> tuple[str, ...]:
    return tuple(_toml(files("edge_slm") / "data" / "teacher" / "themes.toml")["themes"])


def _toml(file: Traversable) -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    return data


def answer_messages(ask: Ask, words: int) -> Messages:
    """The conversation whose next message is the answer, in about `words` words."""
    prompt = task_prompt(ask.task)
    turns: list[tuple[str, str]] = []
    for request, response in prompt.examples:
        turns += [("user", _question(request, count_words(response))), ("assistant", response)]
    turns.append(("user", _question(ask.request, words)))
    turns[0] = ("user", f"{prompt.what} {_RULES}\n\n{turns[0][1]}")
    return tuple(turns)


def _question(request: str, words: int) -> str:
    return f"Request: {request}\nLength: {words} {'word' if words == 1 else 'words'}"


def length(ask: Ask, candidate: int) -> int:
    """The words to ask for: the ask's, else drawn from the task's usual lengths.

    Log-uniform, so that short texts are as frequent as long ones.
    """
    if ask.words is not None:
        return ask.words
    least, most = task_prompt(ask.task).words
    rng = random.Random(f"{ask.seed}/{candidate}/{ask.request}")
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def max_tokens(words: int) -> int:
    """Room for a text of so many words in any tokenizer."""
    return 48 + 3 * words


def idea_messages(task: str, seed: int) -> Messages:
    """The conversation whose next message is IDEAS_PER_PROMPT new requests, one a line.

    Two themes, drawn by the seed, keep an LLM from having the same ideas each time.
    """
    prompt = task_prompt(task)
    rng = random.Random(f"{seed}/{task}")
    themes = " and ".join(rng.sample(_themes(), 2))
    shown = rng.sample(prompt.ideas, min(len(prompt.ideas), _SHOWN_IDEAS))
    more = "what else such a user could type, each very different from the others"
    return (
        ("user", f"{prompt.what}\n\nList {len(shown)} requests a user could type, one a line."),
        ("assistant", "\n".join(shown)),
        ("user", f"List {IDEAS_PER_PROMPT} more, one a line: {more}. Touch on {themes}."),
    )


def completion(messages: Messages) -> str:
    """The same as plain text, for a model without a chat template; a blank line ends
    the answer."""
    turns = [f"{content}\n" if role == "user" else f"{content}\n\n" for role, content in messages]
    return "".join(turns)


def ideas(text: str) -> list[str]:
    """The requests of an answer to `idea_messages`, as a user would type them."""
    found = []
    for line in _without_thinking(text).splitlines():
        if not _FENCE.match(line) and not line.rstrip().endswith(":"):
            try:
                found.append(clean_request(_bare(line)))
            except RequestError:
                continue
    return [idea for idea in found if count_words(idea) <= _LONGEST_IDEA]


def usable(answers: Iterable[tuple[str, bool]]) -> list[str]:
    """The distinct clean texts of (answer, was it cut at its token limit) pairs.

    A cut answer ends at its last clause end; without one it is dropped.
    """
    texts = []
    for answer, cut in answers:
        text = clean(answer)
        if cut:
            text = (clause_cuts(text + " ") or [""])[-1].rstrip(",;:")
        texts.append(text)
    return list(dict.fromkeys(filter(None, texts)))


_FENCE = re.compile(r"\s*```")
_FENCED = re.compile(r"```[\w-]*\n(.*?)(?:```|\Z)", re.DOTALL)
_MARK = re.compile(r"^\s*(?:[-*•>]\s+|#+\s+|\(?\d{1,3}[.)]\s+)")  # bullet, heading, number
_LEAD_IN = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|absolutely)\b[^:\n]{0,80}[:!.]\s*)?"
    r"(?:(?:here(?:'s|’s| is| are)|this is)\b[^:\n]{0,80}:|"
    r"(?:(?:the|your|image|video|design|final|expanded)\s+)*"
    r"(?:prompt|answer|response|text|output|title|tags|caption|sentence)\s*:)\s*",
    re.IGNORECASE,
)
_AFTERWORD = re.compile(
    r"^(?:let me know|i hope|feel free|would you like|note:|explanation:|\(?word count|"
    r"\(?length:|request:|\(\d+ words\))",
    re.IGNORECASE,
)
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»", "`": "`"}


def clean(text: str) -> str:
    """The answer alone, on one line: without thinking, fences, lead-ins, numbers, quotes."""
    text = _without_thinking(text)
    if fenced := _FENCED.search(text):
        text = fenced[1]
    lines = [line for line in text.splitlines() if line.strip()]
    kept: list[str] = []
    for line in lines:
        bare = _bare(line)
        if _AFTERWORD.match(bare):
            if kept:
                break
        elif bare:
            kept.append(bare)
    items = sum(bool(_MARK.match(line)) for line in lines)
    return _unquoted((", " if items > 1 else " ").join(kept))


def _without_thinking(text: str) -> str:
    """An answer that never came out of its thoughts is empty."""
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0].strip()


def _bare(line: str) -> str:
    """A line without mark, emphasis, lead-in and quotes, white space folded."""
    line = " ".join(_MARK.sub("", line).replace("**", "").split())
    return _unquoted(_LEAD_IN.sub("", line))


def _unquoted(text: str) -> str:
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = _APOSTROPHE.sub("", text[1:-1])
        if text[0] in inner or text[-1] in inner:
            break  # two quotations, not one around all
        text = text[1:-1].strip()
    return text
