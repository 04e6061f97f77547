"""An LLM as the judge: a rubric, one question per sample, a score parsed from the answer."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from edge_slm.distill.chat import Chat, ChatRequest
from edge_slm.distill.rewards.base import Float32
from edge_slm.distill.rewards.cache import RowCache, digest
from edge_slm.distill.samples import Sample
from edge_slm.distill.tasks import task_brief
from edge_slm.progress import Progress
from edge_slm_runtime.errors import TeacherError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SCORE = re.compile(r"\bscore\b[^\w-]{0,6}(\d+(?:\.\d+)?)", re.IGNORECASE)
_BARE = re.compile(r"^[^\w-]{0,3}(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W{0,3}$")  # a number alone
_MAY_FAIL = 0.01  # share of the questions of a call that may get no readable score


def parse_score(answer: str) -> float | None:
    """The last "Score: N" (or an answer that is a number alone), 1 … 10 → 0 … 1."""
    numbers = _SCORE.findall(answer) or _BARE.findall(answer.strip())
    points = float(numbers[-1]) if numbers else 0.0
    return (points - 1) / 9 if 1 <= points <= 10 else None


class LlmJudge:
    """Scores samples through a chat server, 0 … 1; scores are cached by content.

    cache: a folder (made if missing) or None. A question without a readable score is
    asked once more. One that still has none scores 0 and is not cached; when these are
    more than 1% of the questions, `score` raises TeacherError.
    """

    name = "judge"

    def __init__(self, chat: Chat, cache: Path | None = None) -> None:
        text = (files("edge_slm") / "data" / "teacher" / "judge.toml").read_text("utf-8")
        rubric: dict[str, Any] = tomllib.loads(text)
        self._question = Template(rubric["question"].strip())
        self._max_tokens: int = rubric["max_tokens"]
        self._chat = chat
        self._scores = RowCache(cache / "judge.scores" if cache else None, 1, np.float32)

    def score(self, samples: Sequence[Sample], progress: Progress | None = None) -> Float32:
        """Raises TeacherError when the server fails; the scores until then are cached."""
        questions = [self._ask(sample) for sample in samples]
        keys = [digest(self._chat.model, question) for question in questions]
        todo = {k: q for k, q in zip(keys, questions, strict=True) if k not in self._scores}
        failed = dict(self._unreadable(todo, 0.0, 0, progress))
        again = {key: todo[key] for key in failed}
        failed = dict(self._unreadable(again, 0.7, 1, None))  # now with some variation
        if len(failed) > _MAY_FAIL * len(todo):
            raise TeacherError(
                f"{self._chat.base_url}: no score in {len(failed)} of {len(todo)} answers of "
                f"{self._chat.model!r}, such as {shown(next(iter(failed.values())))}",
                "use a model that follows the rubric; scores so far are kept",
            )
        scores = [0.0 if key in failed else float(self._scores[key][0]) for key in keys]
        return np.array(scores, np.float32)

    def _ask(self, sample: Sample) -> str:
        """The question; the texts as JSON strings, so that neither can close its quotation."""
        return self._question.substitute(
            brief=task_brief(sample.task).what,
            request=json.dumps(sample.request, ensure_ascii=False),
            response=json.dumps(sample.response, ensure_ascii=False),
        )

    def _unreadable(
        self, questions: dict[bytes, str], temperature: float, seed: int, progress: Progress | None
    ) -> Iterator[tuple[bytes, str]]:
        """Caches every score as it arrives; yields (key, answer) where there is none."""
        prompts = [
            ChatRequest((("user", question),), temperature, self._max_tokens, seed)
            for question in questions.values()
        ]
        for key, reply in zip(questions, self._chat.ask(prompts, progress), strict=True):
            score = None if reply.cut else parse_score(reply.text)  # "1" may be half of "10"
            if score is None:
                yield key, reply.text
            else:
                self._scores.add([(key, [score])])
