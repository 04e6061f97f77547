"""A teacher that is a bundle of ours, run in batches by our own engines.

A model that reads commands gets them: the highest level, and lengths that its training saw. Any
other model gets the few-shot prompt of a teacher as text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
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
from edge_slm_runtime import SLM, Generation, Request, load
from edge_slm_runtime.errors import BadSetting

_ROWS = 32  # answered together


class BundleTeacher:
    """Answers the requests of the data; it invents none.

    bundle: its folder or the name of an installed one. temperature: of the answers, each with
    a seed of its own. Texts that the model did not end itself are left out. Raises what
    `load` raises.
    """

    def __init__(self, bundle: str, temperature: float) -> None:
        self._slm = load(bundle)
        self._temperature = temperature
        self.name = f"bundle:{self._slm.manifest.name}"

    def invent(self, task: str, count: int, seed: int) -> list[str]:
        """Raises BadSetting."""
        raise BadSetting(
            "a teacher of kind 'bundle' invents no requests", "set teacher.source = 'data'"
        )

    def answer(
        self, asks: Sequence[Ask], candidates: int, progress: Progress | None = None
    ) -> Iterator[tuple[Ask, list[str]]]:
        """Every ask, in order, with up to `candidates` distinct texts."""
        requests = (self._request(ask, i) for ask in asks for i in range(candidates))
        answers = self._slm.generate_batch(requests, _ROWS)
        for done, ask in enumerate(asks, 1):
            yield ask, _texts(islice(answers, candidates))
            if progress is not None:
                progress(done, len(asks))

    def _request(self, ask: Ask, candidate: int) -> Request:
        seed = ask.seed + candidate
        settings: dict[str, Any] = {
            "temperature": self._temperature,
            "seed": seed,
            "keep_length": False,
            "syntax": "none",
        }
        schema = self._slm.manifest.prompt.schema
        if schema is None:
            about = length(ask, candidate)
            prompt = completion(answer_messages(ask, about))
            return Request(prompt, max_new_tokens=max_tokens(about), stop=("\n\n",), **settings)
        words = ask.words or _usual_length(self._slm, ask, random.Random(f"{seed}/{ask.request}"))
        return Request(ask.request, ask.task, words, schema.levels - 1, **settings)


def _usual_length(slm: SLM, ask: Ask, rng: random.Random) -> int | None:
    """A length as frequent as it was in the training data of the task."""
    axis = slm.schema.axis("words")
    counts = slm.schema.support.get(ask.task, {}).get("words", {})
    seen = [value for value in axis.values if counts.get(value, 0) >= slm.schema.min_support]
    if not seen:
        return None
    (value,) = rng.choices(seen, [counts[value] for value in seen])
    return rng.randint(*axis.bounds(value))


def _texts(answers: Iterator[Generation]) -> list[str]:
    ended = [answer for answer in answers if answer.finish_reason in ("stop", "stop_sequence")]
    return usable((answer.text, False) for answer in ended)
