"""Variants of samples: more training data without new text.

Each has an outcome that is true of it:

- *cuts*: the response ends early, at the end of a sentence or, in a list of phrases, at a
  comma: it is whole at its length → shorter lengths;
- *fragments*: the request is one or two phrases of the response → a text that contains its
  subject;
- *swaps*: another text takes the place of the one that the response quotes and the request
  gives → copying, of any text;
- *mismatches*: the response belongs to another request → low relevance.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_slm.distill.cuts import whole_cuts
from edge_slm.distill.samples import Sample
from edge_slm.distill.split import held_out
from edge_slm_runtime.command import count_words
from edge_slm_runtime.words import UNFINISHED_REQUEST

if TYPE_CHECKING:
    from edge_slm.distill.recipe import HindsightRecipe

_PHRASE = re.compile(r"[^,;:.!?\"()\[\]]+")


def fragment_request(text: str, rng: random.Random) -> str | None:
    """A request made of one or two phrases of `text`, in their order."""
    phrases = []
    for match in _PHRASE.finditer(text):
        words = match[0].split()
        while words and words[0].lower() in ("and", "with", "its", "their", "his", "her", "while"):
            words = words[1:]
        words = words[: rng.randint(3, 9)]
        while words and words[-1].lower() in UNFINISHED_REQUEST:
            words = words[:-1]
        if len(words) >= 2:
            phrases.append(" ".join(words))
    if not phrases:
        return None
    # The subject is among the first phrases; details come from anywhere.
    chosen = [phrases[0] if rng.random() < 0.6 else rng.choice(phrases[:3])]
    if len(phrases) > 2 and rng.random() < 0.35:
        chosen.append(rng.choice(phrases[1:]))
    chosen = list(dict.fromkeys(chosen))
    request = ", ".join(chosen)
    return request[0].lower() + request[1:] if rng.random() < 0.7 else request


def swap(sample: Sample, texts: Sequence[str], rng: random.Random) -> Sample | None:
    """The sample with one of `texts` instead of its request, which the response quotes.

    None if the response does not quote it, or names it elsewhere too. The other text is about
    as long, as far as a few draws find one.
    """
    quoted = f'"{sample.request}"'
    if sample.response.count(quoted) != sample.response.count(sample.request):
        return None
    if quoted not in sample.response:
        return None
    words = count_words(sample.request)
    drawn = [text for text in rng.choices(texts, k=8) if text != sample.request]
    if not drawn:
        return None
    other = min(drawn, key=lambda text: abs(count_words(text) - words))
    response = sample.response.replace(quoted, f'"{other}"')
    return replace(sample, request=other, response=response, kind="swap")


def vary(
    pairs: Sequence[Sample],
    lone: Sequence[Sample],
    recipe: HindsightRecipe,
    holdout_percent: int,
    seed: int,
) -> list[Sample]:
    """The distinct pairs and their variants, in an order fixed by the seed.

    A request made by a fragment is never a held-out one.
    """
    rng = random.Random(seed + 1)
    pool: list[Sample] = list(pairs)
    for sample in lone:
        if recipe.fragments.get(sample.task) and (
            request := fragment_request(sample.response, rng)
        ):
            pool.append(replace(sample, request=request, kind="fragment"))
    for sample in pairs:
        for _ in range(recipe.fragments.get(sample.task, 0)):
            if request := fragment_request(sample.response, rng):  # to which it may be no fault
                pool.append(replace(sample, request=request, kind="fragment", fault=""))
    pool = _at_most(pool, "fragment", recipe.fragment_share, lambda sample: 1, rng)
    for task, count in recipe.swaps.items():
        own = [sample for sample in pairs if sample.task == task]
        texts = [sample.request for sample in own]
        pool += filter(None, (swap(sample, texts, rng) for sample in own * count))
    pool = [sample for sample in pool if not held_out(sample.request, holdout_percent)]
    for sample in list(pool):
        cuts = [cut for cut in whole_cuts(sample.response) if count_words(cut) >= 3]
        cuts = [cut for cut in cuts if sample.fault in cut]  # one before it would be good
        for cut in rng.sample(cuts, min(len(cuts), recipe.cuts.get(sample.task, 0))):
            if cut.lower().strip(" .") != sample.request.lower().strip(" ."):
                pool.append(replace(sample, response=cut, kind="cut"))
    pool = _at_most(pool, "cut", recipe.cut_share, lambda sample: sample.words, rng)
    pool += _mismatches(pool, recipe.mismatch_share, rng)
    return list(dict.fromkeys(pool))


def _mismatches(pool: Sequence[Sample], share: float, rng: random.Random) -> list[Sample]:
    """So many that they are `share` of all, in each task."""
    matched = {(sample.request, sample.response) for sample in pool}
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in pool:
        by_task[sample.task].append(sample)
    mismatches = []
    for rows in by_task.values():
        for _ in range(int(len(rows) * share / (1 - share))):
            one, other = rng.choice(rows), rng.choice(rows)
            if (one.request, other.response) not in matched:
                mismatches.append(replace(other, request=one.request, kind="mismatch", fault=""))
    return mismatches


def _at_most(
    pool: list[Sample],
    kind: str,
    share: float,
    size: Callable[[Sample], int],
    rng: random.Random,
) -> list[Sample]:
    """The pool with so many samples of a kind, drawn at random, that they are at most `share`
    of the size of all."""
    if share >= 1:
        return pool
    others = [sample for sample in pool if sample.kind != kind]
    left = sum(map(size, others)) * share / (1 - share)
    for sample in rng.sample(drawn := [s for s in pool if s.kind == kind], len(drawn)):
        if (left := left - size(sample)) < 0:
            break
        others.append(sample)
    return others
