"""The embedded teacher: composes requests and answers from lexicons, without a model.

Its answers differ in quality on purpose, the best first, so that rewards are spread over
high and low levels: "best" contains the request word for word and adds details that fit it,
"middling" contains its beginning and adds details that fit anything, "poor" is about
something else. The lexicons (edge_slm/data/teacher/lexicon) were written for this project.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from edge_slm.distill.teachers.base import Ask
from edge_slm.distill.teachers.few_shot import length
from edge_slm.distill.teachers.grammar import keywords, titles
from edge_slm.distill.teachers.grammar.compose import Composer, Quality
from edge_slm.distill.teachers.grammar.graphics import (
    design,
    design_idea,
    lettering,
    lettering_idea,
)
from edge_slm.distill.teachers.grammar.pictures import image, picture_idea, video
from edge_slm.progress import Progress
from edge_slm_runtime.command import count_words

LONGEST = {
    "scene": keywords.LONGEST,
    "tags": titles.MOST_TAGS,
    "title": titles.LONGEST_TITLE,
}
_ATTEMPTS = 8  # at a candidate that differs from the others


class GrammarTeacher:
    """Deterministic by seed. An unknown task is answered like "image".

    A text has the commanded number of words, within 2, except that it is never longer than
    `LONGEST`, and never without its subject; a request longer than the text is cut.
    """

    name = "grammar"

    def invent(self, task: str, count: int, seed: int) -> list[str]:
        rng = random.Random(f"{seed}/{task}")
        idea = _IDEAS.get(task, picture_idea)
        requests: dict[str, None] = {}
        for _ in range(20 * count + 100):
            if len(requests) >= count:
                break
            requests[idea(rng)] = None
        return list(requests)

    def answer(
        self, asks: Sequence[Ask], candidates: int, progress: Progress | None = None
    ) -> Iterator[tuple[Ask, list[str]]]:
        for done, ask in enumerate(asks, 1):
            yield ask, _texts(ask, candidates)
            if progress is not None:
                progress(done, len(asks))


def qualities(candidates: int) -> list[Quality]:
    """Half of them best, the rest middling and poor."""
    best = max(1, candidates // 2)
    poor = (candidates - best) // 2
    counts: dict[Quality, int] = {"best": best, "middling": candidates - best - poor, "poor": poor}
    return [quality for quality, count in counts.items() for _ in range(count)]


def _texts(ask: Ask, candidates: int) -> list[str]:
    request = " ".join(ask.request.split())
    compose = _COMPOSERS.get(ask.task, image)
    texts: dict[str, None] = {}
    for i, quality in enumerate(qualities(candidates)):
        rng = random.Random(f"{ask.seed}/{i}/{ask.task}/{request}")
        words = length(ask, i)
        if ask.words is None and ask.task not in LONGEST:
            words = max(words, count_words(request) + 8)  # room to add something
        for _ in range(_ATTEMPTS):
            if (text := compose(request, words, quality, rng)) not in texts:
                texts[text] = None
                break
    return list(texts)


_IDEAS: dict[str, Callable[[random.Random], str]] = {
    "lettering": lettering_idea,
    "design": design_idea,
    "scene": keywords.keyword_idea,
    "tags": titles.tags_idea,
    "title": titles.title_idea,
}
_COMPOSERS: dict[str, Composer] = {
    "image": image,
    "video": video,
    "lettering": lettering,
    "design": design,
    "scene": keywords.scene,
    "tags": titles.tags,
    "title": titles.title,
}
