"""Samples: what a teacher wrote, read from JSONL, and the honest variants made of it.

A sample is (request, response, task). Three kinds of variants multiply them
without new text, each with an outcome that it really has:

- *cuts*: the response ends early, at a clause end → true shorter lengths;
- *fragments*: the request is one or two phrases of the response → the skill of
  weaving a subject into a longer text;
- *mismatches*: the response belongs to another request → true low relevance.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_slm.distill.split import held_out
from edge_slm_runtime.command import WORD_EDGES, clean_request, count_words
from edge_slm_runtime.errors import DataError, RequestError
from edge_slm_runtime.words import UNFINISHED_REQUEST

if TYPE_CHECKING:
    from edge_slm.distill.recipe import DataRecipe, HindsightRecipe

Kind = str  # "pair", "cut", "fragment", "mismatch", "own" (of an exploration round)

_CLAUSE_END = re.compile(r"(?:[,;:]|(?<=[.!?]))(?=\s)")
_PHRASE = re.compile(r"[^,;:.!?\"()\[\]]+")


@dataclass(frozen=True, slots=True)
class Sample:
    request: str
    response: str
    task: str
    kind: Kind = "pair"

    @property
    def words(self) -> int:
        return count_words(self.response)


def read_jsonl(paths: Iterable[str | Path]) -> Iterator[tuple[str | None, str, str]]:
    """(request or None, response, task) of every line of the files (or folders of files).

    Raises DataError with file and line.
    """
    for given in map(Path, paths):
        files = sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
        if not files:
            raise DataError(f"no .jsonl file in {given}", "give JSONL files or a folder of them")
        for file in files:
            try:
                with file.open("rb") as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield _parse(line, f"{file}:{number}")
            except OSError as error:
                raise DataError(f"cannot read {file}: {error.strerror}") from None


def _parse(line: bytes, where: str) -> tuple[str | None, str, str]:
    hint = 'expected {"request": text or null, "response": text, "task": name}'
    try:
        row = json.loads(line.decode("utf-8-sig"))
        request, response, task = row["request"], row["response"], row["task"]
    except (ValueError, RecursionError, TypeError) as error:
        raise DataError(f"{where}: not a JSON object: {error}", hint) from None
    except KeyError as error:
        raise DataError(f"{where}: {error} is missing", hint) from None
    for name, value in (("request", request or ""), ("response", response), ("task", task)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} is {value!r}", hint)
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise DataError(f"{where}: {name} holds half a character", "write valid UTF-8")
    return request, response, task


def read_samples(
    paths: Iterable[str | Path], tasks: Sequence[str] | None = None
) -> Iterator[Sample]:
    """The usable samples of `tasks` (None: of all), white space folded.

    A lone response has request "".
    Usable: a whole request, and a response that adds to it and is not longer than
    a command can ask. Raises DataError with file and line.
    """
    for request, response, task in read_jsonl(paths):
        if tasks is not None and task not in tasks:
            continue
        text = " ".join(response.split())
        if text.count('"') % 2:  # cut just before or after a closing quotation mark
            text = text.rstrip('" ')
        if not 0 < count_words(text) < WORD_EDGES[-1]:
            continue
        if request is None:
            yield Sample("", text, task)
            continue
        try:
            folded = clean_request(request)
        except RequestError:
            continue
        words = folded.split()
        dangling = len(words) > 1 and words[-1].lower().strip(",.") in UNFINISHED_REQUEST
        if not dangling and folded.strip(" .").lower() != text.strip(" .").lower():
            yield Sample(folded, text, task)


def divide(pairs: Sequence[Sample], percent: int) -> tuple[list[Sample], list[Sample]]:
    """(training side, held-out side) of de-duplicated pairs, by the hash of the request.

    The same text often answers several requests. A held-out pair whose response
    begins like one of the training side is on neither side.
    """
    unique = list(dict.fromkeys(pairs))
    train = [pair for pair in unique if not held_out(pair.request, percent)]
    seen = {_opening(pair.response) for pair in train}
    held = [
        pair
        for pair in unique
        if held_out(pair.request, percent) and _opening(pair.response) not in seen
    ]
    return train, held


def load_samples(
    paths: Sequence[str | Path], recipe: DataRecipe, seed: int
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """(training pairs, held-out pairs, lone responses) of the recipe's tasks.

    Lone responses that begin like one of a pair are dropped, so that nothing held
    out comes back. Raises DataError when a task has no pair to train on.
    """
    pairs: list[Sample] = []
    lone: dict[str, Sample] = {}
    for sample in read_samples(paths, recipe.tasks):
        if not sample.request:
            lone[sample.response] = sample
        elif count_words(sample.request) <= recipe.max_request_words:
            pairs.append(sample)
    side, held = divide(pairs, recipe.holdout_percent)
    rng = random.Random(seed)
    train: list[Sample] = []
    for task in recipe.tasks:
        kept = [pair for pair in side if pair.task == task]
        if not kept:
            raise DataError(f"no usable sample for task {task}", "check the data or the recipe")
        rng.shuffle(kept)
        train += kept[: recipe.max_rows.get(task, len(kept))]
    taken = {_opening(pair.response) for pair in pairs}
    return train, held, [s for s in lone.values() if _opening(s.response) not in taken]


def _opening(text: str) -> str:
    return " ".join(text.lower().split()[:8])


def held_out_samples(
    data: Sequence[str | Path], tasks: Sequence[str], count: int, percent: int
) -> list[Sample]:
    """Up to `count` held-out samples, one per request, shared among `tasks` as evenly
    as the data allows."""
    # Of all tasks: a text may be of one task in training and of another here.
    _, held = divide([sample for sample in read_samples(data) if sample.request], percent)
    by_task: dict[str, dict[str, Sample]] = {task: {} for task in tasks}
    for sample in held:
        if sample.task in by_task:
            by_task[sample.task].setdefault(sample.request, sample)
    chosen: list[Sample] = []
    # The task with the fewest goes first; what it lacks falls to the others.
    for left, task in enumerate(sorted(tasks, key=lambda task: len(by_task[task]))):
        samples = list(by_task[task].values())
        share = (count - len(chosen)) // (len(tasks) - left)
        chosen += random.Random(task).sample(samples, min(share, len(samples)))
    return chosen


def clause_cuts(text: str) -> list[str]:
    """All proper prefixes of `text` that end at a clause end, shortest first.

    A full stop stays: without it a whole sentence would look truncated.
    """
    return [text[: match.start()].rstrip() for match in _CLAUSE_END.finditer(text)]


def fragment_request(text: str, rng: random.Random) -> str | None:
    """A request made of one or two phrases of `text`, in the order they stand."""
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
    # The subject stands early; details come from anywhere.
    chosen = [phrases[0] if rng.random() < 0.6 else rng.choice(phrases[:3])]
    if len(phrases) > 2 and rng.random() < 0.35:
        chosen.append(rng.choice(phrases[1:]))
    chosen = list(dict.fromkeys(chosen))
    request = ", ".join(chosen)
    return request[0].lower() + request[1:] if rng.random() < 0.7 else request


def vary(
    pairs: Sequence[Sample],
    lone: Sequence[Sample],
    recipe: HindsightRecipe,
    holdout_percent: int,
    seed: int,
) -> list[Sample]:
    """The pairs and their variants, de-duplicated, in a fixed order for a seed.

    A request that a fragment makes is never a held-out one either.
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
            if request := fragment_request(sample.response, rng):
                pool.append(replace(sample, request=request, kind="fragment"))
    pool = [sample for sample in pool if not held_out(sample.request, holdout_percent)]
    for sample in list(pool):
        cuts = [cut for cut in clause_cuts(sample.response) if count_words(cut) >= 3]
        for cut in rng.sample(cuts, min(len(cuts), recipe.cuts.get(sample.task, 0))):
            if cut.lower() != sample.request.lower():
                pool.append(replace(sample, response=cut, kind="cut"))
    matched = {(sample.request, sample.response) for sample in pool}
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in pool:
        by_task[sample.task].append(sample)
    for task, rows in by_task.items():
        wanted = int(len(rows) * recipe.mismatch_share / (1 - recipe.mismatch_share))
        for _ in range(wanted):
            one, other = rng.choice(rows), rng.choice(rows)
            if (one.request, other.response) not in matched:
                pool.append(Sample(one.request, other.response, task, "mismatch"))
    return list(dict.fromkeys(pool))
