"""The rows of a batch and their answers, each a record of the output."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, repeat
from typing import Any, BinaryIO

import edge_slm
from edge_slm.cli.batch_input import SETTINGS, InputLine, read_input
from edge_slm_runtime.command import is_count
from edge_slm_runtime.errors import BadSetting, DataError, EdgeSlmError, shown
from edge_slm_runtime.ranking import MOST

# Keys of output records, beside the id, the request and its settings.
_OF_ANSWERS = (
    *("line", "repeats", "text", "asked_words", "finish_reason", "in_tolerance", "warnings"),
    *("error", "score", "confidence", "logprobs", "others"),
)


@dataclass(frozen=True, slots=True)
class BatchRun:
    """Answers the rows of an input. form, encoding: see `read_input`. defaults: `Request`
    settings of rows without their own. n: answers of such a row."""

    slm: edge_slm.SLM
    form: str
    encoding: str | None
    defaults: dict[str, Any]
    n: int
    seed: int
    batch_size: int

    def record(self, input_sha256: str) -> dict[str, Any]:
        """Everything that the answers depend on."""
        return {
            "input_sha256": input_sha256,
            "format": self.form,
            "encoding": self.encoding,
            "bundle": self.slm.manifest.digest,
            "variant": self.slm.variant.name,
            "threads": self.slm.threads,
            "batch_size": self.batch_size,
            "version": edge_slm.__version__,
            **self.defaults,
            "n": self.n,
            "seed": self.seed,
        }

    def rows(self, stream: BinaryIO) -> Iterator[InputLine]:
        """As `read_input`."""
        return read_input(stream, self.form, self.encoding)

    def answers(
        self,
        stream: BinaryIO,
        group: int,
        done: int = 0,
        earlier: Iterable[dict[str, Any]] = repeat({"error": None}),
    ) -> Iterator[dict[str, Any]]:
        """Output records after the first `done` rows, computed `group` rows at a time.

        earlier: a record for each row; those that hold an answer are kept.
        """
        pairs = islice(zip(self.rows(stream), earlier, strict=False), done, None)
        while some := list(islice(pairs, group)):
            rows = [(self._checked(row) if "error" in old else row, old) for row, old in some]
            asked = [row.request for row, _ in rows if row.request and row.n == 1]
            results = self.slm.generate_batch(asked, self.batch_size)
            for row, old in rows:
                if "error" not in old:
                    yield old | {"line": row.line}
                elif row.error:
                    yield _failure(row, row.error)
                elif row.request and row.n > 1:
                    yield _answer(row, *self.slm.variations(row.request, row.n))
                else:
                    yield _answer(row, next(results))

    def _checked(self, row: InputLine) -> InputLine:
        """The row with its request or its error."""
        if row.error:
            return row
        try:
            _check_fields(row)
            given = {name: row.fields[name] for name in SETTINGS if name in row.fields}
            settings = {"seed": None, **self.defaults, **given}
            n = self.n if row.fields.get("n") is None else row.fields["n"]
            if not is_count(n) or not 1 <= n <= MOST:
                raise BadSetting(f"n is {shown(n)}", f"allowed: 1 … {MOST}, whole")
            if settings["seed"] is None and (settings["temperature"] or n > 1):
                settings["seed"] = _seed_of(self.seed, row.line)
            request = edge_slm.Request(**settings)
            self.slm.check(request if n == 1 else replace(request, logprobs=True))
        except EdgeSlmError as error:
            return replace(row, error=error)
        return replace(row, request=request, n=n)


def _check_fields(row: InputLine) -> None:
    if "id" in row.fields and row.fields["id"] is not None and row.id is None:
        raise DataError("'id' must be a text of whole characters or a whole number")
    if "request" not in row.fields:
        raise DataError("'request' is missing")
    if taken := [key for key in row.others if key in _OF_ANSWERS]:
        raise DataError(f"the answer has a key {taken[0]!r} of its own", "rename yours")
    for name in ("stop", "ban", "keep", "choices"):
        if not isinstance(row.fields.get(name, ""), str | list):
            raise DataError(f"'{name}' must be a text or a list of texts")
    if not isinstance(row.fields.get("keep_length", True), bool):
        raise DataError("'keep_length' must be true or false")


def _seed_of(seed: int, line: int) -> int:
    """A seed from the run's seed and the line alone, so that a resumed run has the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{line}".encode()).digest()[:4], "big")


def _begun(row: InputLine) -> dict[str, Any]:
    """What a record of a row begins with."""
    repeats = {} if row.repeats is None else {"repeats": row.repeats}
    return {"line": row.line, "id": row.id, **repeats, "request": row.fields.get("request")}


def _failure(row: InputLine, error: EdgeSlmError) -> dict[str, Any]:
    others = {key: value for key, value in row.others.items() if key not in _OF_ANSWERS}
    return {**_begun(row), **others, "error": {"code": error.code, "message": str(error)}}


def _answer(
    row: InputLine, result: edge_slm.Generation, *others: edge_slm.Generation
) -> dict[str, Any]:
    """No timings, so that two runs over the same input are equal. others: of a row of several
    answers, those behind the best."""
    assert row.request
    values = {"score": result.score, "confidence": result.confidence}
    asked: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if row.request.logprobs:
        asked["logprobs"] = result.logprobs
    if row.n > 1:
        names = ("text", "words", "seed", *(name for name in values if name in asked))
        asked["others"] = [{name: getattr(one, name) for name in names} for one in others]
    return {
        **_begun(row),
        "text": result.text,
        "words": result.words,
        "task": result.asked.task,
        "relevance": result.asked.relevance,
        "asked_words": result.asked.words,
        "finish_reason": result.finish_reason,
        "in_tolerance": result.in_tolerance,
        "seed": result.seed,
        "warnings": list(result.warnings),
        **asked,
        **row.others,
    }
