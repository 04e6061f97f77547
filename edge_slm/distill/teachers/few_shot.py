"""Few-shot prompts for a teacher LLM, and the cleaning of its answers."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable

from edge_slm.distill.cuts import clause_cuts
from edge_slm.distill.tasks import task_brief, themes
from edge_slm.distill.teachers.base import Ask
from edge_slm_runtime.command import count_words
from edge_slm_runtime.errors import RequestError
from edge_slm_runtime.request_text import clean_request

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


def answer_messages(ask: Ask, words: int) -> Messages:
    """The conversation whose next message is the answer, in about `words` words."""
    brief = task_brief(ask.task)
    turns: list[tuple[str, str]] = []
    for request, response in brief.examples:
        turns += [("user", _question(request, count_words(response))), ("assistant", response)]
    turns.append(("user", _question(ask.request, words)))
    turns[0] = ("user", f"{brief.what} {_RULES}\n\n{turns[0][1]}")
    return tuple(turns)


def _question(request: str, words: int) -> str:
    return f"Request: {request}\nLength: {words} {'word' if words == 1 else 'words'}"


def length(ask: Ask, candidate: int) -> int:
    """The target length in words: that of the ask, else drawn from the task's usual lengths.

    Log-uniform, so that short texts are as frequent as long ones.
    """
    if ask.words is not None:
        return ask.words
    least, most = task_brief(ask.task).words
    rng = random.Random(f"{ask.seed}/{candidate}/{ask.request}")
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def max_tokens(words: int) -> int:
    """Room for a text of so many words in any tokenizer."""
    return 48 + 3 * words


def idea_messages(task: str, seed: int) -> Messages:
    """The conversation whose next message is IDEAS_PER_PROMPT new requests, one a line.

    Two themes, drawn by the seed, keep an LLM from repeating its ideas.
    """
    brief = task_brief(task)
    rng = random.Random(f"{seed}/{task}")
    subjects = " and ".join(rng.sample(themes(), 2))
    shown = rng.sample(brief.ideas, min(len(brief.ideas), _SHOWN_IDEAS))
    more = "what else such a user could type, each very different from the others"
    return (
        ("user", f"{brief.what}\n\nList {len(shown)} requests a user could type, one a line."),
        ("assistant", "\n".join(shown)),
        ("user", f"List {IDEAS_PER_PROMPT} more, one a line: {more}. Touch on {subjects}."),
    )


def completion(messages: Messages) -> str:
    """The conversation as plain text, for a model without a chat template; the answer ends
    at a blank line."""
    turns = [f"{content}\n" if role == "user" else f"{content}\n\n" for role, content in messages]
    return "".join(turns)


def ideas(text: str) -> list[str]:
    """The requests of an answer to `idea_messages`, as a user would type them."""
    requests = []
    for line in _without_thinking(text).splitlines():
        if not _FENCE.match(line) and not line.rstrip().endswith(":"):
            try:
                requests.append(clean_request(_bare(line)))
            except RequestError:
                continue
    return [request for request in requests if count_words(request) <= _LONGEST_IDEA]


def usable(answers: Iterable[tuple[str, bool]]) -> list[str]:
    """The distinct clean texts of (answer, whether it reached its token limit) pairs.

    An answer that reached the limit is cut at its last clause end, or dropped without one.
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
    """The answer on one line, without reasoning, fences, lead-ins, numbering and quotes."""
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
    """Without the reasoning of the model; empty if the reasoning never ended."""
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0].strip()


def _bare(line: str) -> str:
    """A line without list mark, emphasis, lead-in and quotes, white space folded."""
    line = " ".join(_MARK.sub("", line).replace("**", "").split())
    return _unquoted(_LEAD_IN.sub("", line))


def _unquoted(text: str) -> str:
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = _APOSTROPHE.sub("", text[1:-1])
        if text[0] in inner or text[-1] in inner:
            break  # two quotations, not one around the whole text
        text = text[1:-1].strip()
    return text
