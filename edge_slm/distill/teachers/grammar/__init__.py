"""The embedded teacher: composes requests and answers from lexicons, with nothing else.

Its answers differ in quality on purpose, the best first, so that a reward finds high
and low levels: "best" keeps the request word for word and adds details that fit it,
"middling" keeps its beginning and adds what fits anything, "poor" drifts away.
The texts of the lexicons (edge_slm/data/teacher/lexicon) were written for this project.
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
_ATTEMPTS = 8  # at a candidate that is unlike the others


class GrammarTeacher:
    """Deterministic by seed. A task that it does not know is answered like "image".

    A text has the words asked for, within 2. Two things come first: a text is never
    longer than `LONGEST`, and never without what it is
    about, so that few words may be asked of a request, but a longer request is cut.
    """

    name = "grammar"

    def invent(self, task: str, count: int, seed: int) -> list[str]:
        rng = random.Random(f"{seed}/{task}")
        idea = _IDEAS.get(task, picture_idea)
        found: dict[str, None] = {}
        for _ in range(20 * count + 100):
            if len(found) >= count:
                break
            found[idea(rng)] = None
        return list(found)

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
    found: list[Quality] = ["best"] * best
    found += ["middling"] * (candidates - best - poor)
    found += ["poor"] * poor
    return found


def _texts(ask: Ask, candidates: int) -> list[str]:
    request = " ".join(ask.request.split())
    compose = _COMPOSERS.get(ask.task, image)
    found: dict[str, None] = {}
    for i, quality in enumerate(qualities(candidates)):
        rng = random.Random(f"{ask.seed}/{i}/{ask.task}/{request}")
        words = length(ask, i)
        if ask.words is None and ask.task not in LONGEST:
            words = max(words, count_words(request) + 8)  # room to add something
        for _ in range(_ATTEMPTS):
            if (text := compose(request, words, quality, rng)) not in found:
                found[text] = None
                break
    return list(found)


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
