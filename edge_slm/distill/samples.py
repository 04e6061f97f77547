"""Samples of a teacher: a request, its response and the task, read from JSONL files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_slm.distill.cuts import whole_cuts, with_full_stop
from edge_slm.distill.split import EVERYTHING, Reading, held_out
from edge_slm_runtime.command import count_words
from edge_slm_runtime.errors import DataError, RequestError
from edge_slm_runtime.files import read_lines
from edge_slm_runtime.request_text import clean_request
from edge_slm_runtime.words import UNFINISHED_REQUEST

if TYPE_CHECKING:
    from edge_slm.distill.recipe import DataRecipe


_OPENING = re.compile(
    r"(?i)(?:in|on|at|under|with|from|inside|beside|near|during|after|captured)\b"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A response to a request; kind: "pair", "cut", "fragment", "swap", "mismatch", or "own" for an
    episode of the model itself. quality: a judgement from 0 to 1, which multiplies the reward.
    fault: the first sentence of the response that is not good; "" where no single one is, or it is
    unknown."""

    request: str
    response: str
    task: str
    kind: str = "pair"
    quality: float = 1.0
    fault: str = ""

    @property
    def words(self) -> int:
        return count_words(self.response)


class Row(NamedTuple):
    """A line of a file of samples. A request alone, for a teacher to answer, has the response
    "", and a response alone the request None."""

    request: str | None
    response: str
    task: str
    quality: float = 1.0
    fault: str = ""


def read_jsonl(paths: Iterable[str | Path], leave_out: Sequence[str] = ()) -> Iterator[Row]:
    """Every line of the files (or folders of files).

    leave_out: beginnings of the "source" of lines that are skipped. Raises DataError with
    file and line.
    """
    for given in map(Path, paths):
        files = sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
        if not files:
            raise DataError(f"no .jsonl file in {given}", "give JSONL files or a folder of them")
        for file in files:
            try:
                with file.open("rb") as stream:
                    for number, line in enumerate(read_lines(stream), 1):
                        if line.strip():
                            row, source = _parse(line, f"{file}:{number}")
                            if not (leave_out and source.startswith(tuple(leave_out))):
                                yield row
            except OSError as error:
                raise DataError(f"cannot read {file}: {error.strerror}") from None


def _parse(line: bytes, where: str) -> tuple[Row, str]:
    """(row, its source). Raises DataError."""
    hint = 'expected {"request": text or null, "response": text or null, "task": name}'
    try:
        row = json.loads(line.decode("utf-8-sig"))
        request, response, task = row["request"], row["response"], row["task"]
    except (ValueError, RecursionError, TypeError) as error:
        raise DataError(f"{where}: not a JSON object: {error}", hint) from None
    except KeyError as error:
        raise DataError(f"{where}: {error} is missing", hint) from None
    response = "" if response is None and request else response
    for name, value in (("request", request or ""), ("response", response), ("task", task)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} is {value!r}", hint)
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise DataError(f"{where}: {name} holds half a character", "write valid UTF-8")
    quality = row.get("quality", 1.0)
    if isinstance(quality, bool) or not isinstance(quality, int | float) or not 0 <= quality <= 1:
        raise DataError(f"{where}: quality is {quality!r}", "allowed: 0 … 1; left out it is 1")
    fault = row.get("fault", "")
    if not isinstance(fault, str) or (fault and (quality == 1 or fault not in response)):
        hint = "give a sentence of the response, and a quality below 1"
        raise DataError(f"{where}: fault is {fault!r}", hint)
    return Row(request, response, task, float(quality), fault), str(row.get("source", ""))


def read_samples(
    paths: Iterable[str | Path],
    tasks: Sequence[str] | None = None,
    reading: Reading = EVERYTHING,
) -> Iterator[Sample]:
    """The usable samples of `tasks` (None: of all), white space folded.

    Usable: a complete request, and a response that differs from it and has a length that a
    command can ask for. A response alone has request "". Raises DataError with file and line.
    """
    for request, response, task, quality, fault in read_jsonl(paths, reading.leave_out):
        if tasks is not None and task not in tasks:
            continue
        text, bad = " ".join(response.split()), " ".join(fault.split())
        if text.count('"') % 2:  # cut just before or after a closing quotation mark
            text, bad = text.rstrip('" '), bad.rstrip('" ')
        if count_words(text) > reading.longest:
            whole = [cut for cut in whole_cuts(text) if count_words(cut) <= reading.longest]
            text = whole[-1] if whole else ""
        if not text or bad not in text:  # what was cut off was its fault
            continue
        if task in reading.sentences:
            text = with_full_stop(text)
        if request is None:
            yield Sample("", text, task, quality=quality)
            continue
        try:
            folded = clean_request(request)
        except RequestError:
            continue
        if reading.whole and (_is_opening(folded, text) or text.count('"') % 2):
            continue
        words = folded.split()
        dangling = len(words) > 1 and words[-1].lower().strip(",.") in UNFINISHED_REQUEST
        if not dangling and folded.strip(" .").lower() != text.strip(" .").lower():
            yield Sample(folded, text, task, quality=quality, fault=bad)


def _is_opening(request: str, response: str) -> bool:
    """Whether the request is the beginning of its response and names no subject: "In the rain"."""
    return bool(_OPENING.match(request)) and response.lower().startswith(request.lower())


def read_requests(
    paths: Iterable[str | Path], tasks: Sequence[str], reading: Reading
) -> dict[str, list[str]]:
    """Task → the distinct requests for a teacher: those of all rows that are not held out."""
    requests: dict[str, dict[str, None]] = {task: {} for task in tasks}
    for request, _, task, *_ in read_jsonl(paths, reading.leave_out):
        if not request or task not in requests:
            continue
        try:
            folded = clean_request(request)
        except RequestError:
            continue
        if not held_out(folded, reading.held_percent):
            requests[task][folded] = None
    return {task: list(found) for task, found in requests.items()}


def divide(pairs: Sequence[Sample], percent: int) -> tuple[list[Sample], list[Sample]]:
    """(training side, held-out side) of the distinct pairs, by the hash of the request.

    Near-duplicates are on one side only: not trained on are pairs whose request has the words
    of a held-out one, and not held out are pairs whose response begins like one that is
    trained on, since the same text often answers several requests.
    """
    unique = list(dict.fromkeys(pairs))
    held = [pair for pair in unique if held_out(pair.request, percent)]
    asked = {_words(pair.request) for pair in held}
    train = [pair for pair in unique if _words(pair.request) not in asked]
    seen = {_opening(pair.response) for pair in train}
    return train, [pair for pair in held if _opening(pair.response) not in seen]


def _words(text: str) -> frozenset[str]:
    return frozenset(word.strip(".,;:!?\"'()") for word in text.lower().split())


def load_samples(
    paths: Sequence[str | Path], recipe: DataRecipe, seed: int
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """(training pairs, held-out pairs, lone responses) of the recipe's tasks.

    Held-out pairs: those of dev if the recipe has some, else all.

    Lone responses that begin like one of a pair are dropped, so that no held-out text is
    among them. Raises DataError when a task has no pair to train on.
    """
    pairs: list[Sample] = []
    lone: dict[str, Sample] = {}
    for sample in read_samples(paths, recipe.tasks, recipe.reading()):
        if not sample.request:
            lone[sample.response] = sample
        elif count_words(sample.request) <= recipe.max_request_words:
            pairs.append(sample)
    # The hash of a held-out request is below the percentage: those of dev are above the test's.
    side, held = divide(pairs, recipe.reading().held_percent)
    if recipe.dev_percent:
        held = [pair for pair in held if not held_out(pair.request, recipe.holdout_percent)]
    rng = random.Random(seed)
    train: list[Sample] = []
    for task in recipe.tasks:
        kept = [pair for pair in side if pair.task == task]
        if not kept:
            raise DataError(f"no usable sample for task {task}", "check the data or the recipe")
        rng.shuffle(kept)
        kept = kept[: recipe.max_rows.get(task, len(kept))]
        if recipe.words:
            kept = _as_long_as(kept, recipe.words * recipe.mix[task] / sum(recipe.mix.values()))
        train += kept
    taken = {_opening(pair.response) for pair in pairs}
    return train, held, [s for s in lone.values() if _opening(s.response) not in taken]


def _as_long_as(samples: Sequence[Sample], words: float) -> list[Sample]:
    """The first samples, up to so many words of responses."""
    chosen: list[Sample] = []
    for sample in samples:
        if (words := words - sample.words) < 0:
            break
        chosen.append(sample)
    return chosen


def _opening(text: str) -> str:
    return " ".join(text.lower().split()[:8])


def held_out_samples(
    data: Sequence[str | Path], tasks: Sequence[str] | None, count: int, reading: Reading
) -> list[Sample]:
    """Up to `count` held-out samples, one per request, spread over `tasks` as evenly as the
    data allows; None is all tasks of the data."""
    # Of all tasks: a text may be of one task in training and of another here.
    pairs = [sample for sample in read_samples(data, reading=reading) if sample.request]
    _, held = divide(pairs, reading.holdout_percent)
    tasks = sorted({sample.task for sample in held}) if tasks is None else tasks
    by_task: dict[str, dict[str, Sample]] = {task: {} for task in tasks}
    for sample in held:
        if sample.task in by_task:
            by_task[sample.task].setdefault(sample.request, sample)
    chosen: list[Sample] = []
    # The task with the fewest samples is first; the others share what it lacks.
    for left, task in enumerate(sorted(tasks, key=lambda task: len(by_task[task]))):
        samples = list(by_task[task].values())
        share = (count - len(chosen)) // (len(tasks) - left)
        chosen += random.Random(task).sample(samples, min(share, len(samples)))
    return chosen
