"""An LLM as judge: a rubric, one question per sample, and a score parsed from the answer."""

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

from edge_slm.distill.chat import Chat, Prompt
from edge_slm.distill.rewards.base import Array, Progress
from edge_slm.distill.rewards.cache import RowCache, digest
from edge_slm.distill.samples import Sample
from edge_slm.distill.teachers.few_shot import task_prompt
from edge_slm_runtime.errors import TeacherError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SCORE = re.compile(r"\bscore\b[^\w-]{0,6}(\d+(?:\.\d+)?)", re.IGNORECASE)
_BARE = re.compile(r"^[^\w-]{0,3}(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W{0,3}$")  # a number alone
_MAY_FAIL = 0.01  # share of a call's questions that may stay without a readable answer


def parse_score(answer: str) -> float | None:
    """The last "Score: N" (or an answer that is a number alone), 1 … 10 → 0 … 1."""
    found = _SCORE.findall(answer) or _BARE.findall(answer.strip())
    points = float(found[-1]) if found else 0.0
    return (points - 1) / 9 if 1 <= points <= 10 else None


class Judge:
    """Scores samples through a chat server, 0 … 1; scores are cached by content.

    cache: a folder (made if missing) or None. An answer without a readable score is
    asked for once more; what stays unreadable scores 0 and is not cached, as long as
    it is at most 1% of the questions: beyond that TeacherError.
    """

    name = "judge"

    def __init__(self, chat: Chat, cache: Path | None = None) -> None:
        text = (files("edge_slm") / "data" / "teacher" / "judge.toml").read_text("utf-8")
        rubric: dict[str, Any] = tomllib.loads(text)
        self._question = Template(rubric["question"].strip())
        self._max_tokens: int = rubric["max_tokens"]
        self._chat = chat
        self._scores = RowCache(cache / "judge.scores" if cache else None, 1, np.float32)

    def score(self, samples: Sequence[Sample], progress: Progress | None = None) -> Array:
        """Raises TeacherError when the server fails; what it has judged is kept."""
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
        found = [0.0 if key in failed else float(self._scores[key][0]) for key in keys]
        return np.array(found, np.float32)

    def _ask(self, sample: Sample) -> str:
        """The question; texts as JSON, so that neither can end its quotation."""
        return self._question.substitute(
            brief=task_prompt(sample.task).what,
            request=json.dumps(sample.request, ensure_ascii=False),
            response=json.dumps(sample.response, ensure_ascii=False),
        )

    def _unreadable(
        self, questions: dict[bytes, str], temperature: float, seed: int, progress: Progress | None
    ) -> Iterator[tuple[bytes, str]]:
        """Keeps every score as it comes; yields key and answer where there is none."""
        prompts = [
            Prompt((("user", question),), temperature, self._max_tokens, seed)
            for question in questions.values()
        ]
        for key, reply in zip(questions, self._chat.ask(prompts, progress), strict=True):
            score = None if reply.cut else parse_score(reply.text)  # "1" may be half of "10"
            if score is None:
                yield key, reply.text
            else:
                self._scores.add([(key, [score])])
