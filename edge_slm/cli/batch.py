"""`edge-slm batch`: JSONL requests in, JSONL prompts out; resumable after a crash."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import click

import edge_slm
from edge_slm.cli.console import emit_json, json_option, json_text, note, progress_bar
from edge_slm.cli.options import model_options, sampling_options
from edge_slm.cli.output import ResumableOutput
from edge_slm_runtime.errors import DataError, EdgeSlmError, NotSupportedByEngine
from edge_slm_runtime.files import LONGEST_LINE, copy_lines, read_lines

_KEYS = ["id", *(field.name for field in fields(edge_slm.Request))]
_NEEDED = ("id", "request", "task")
_NEEDED_OF_OTHERS = ("id", "request")  # where the model knows no commands


@dataclass(frozen=True, slots=True)
class InputLine:
    """One line of the input: a request, or its error."""

    line: int
    id: str | int | None = None
    request: edge_slm.Request | None = None
    error: EdgeSlmError | None = None


@dataclass(frozen=True, slots=True)
class BatchRun:
    """Answers lines. defaults: `Request` settings of lines without their own."""

    slm: edge_slm.SLM
    defaults: dict[str, Any]
    seed: int
    batch_size: int

    def record(self, input_sha256: str) -> dict[str, Any]:
        """Everything that the answers depend on."""
        return {
            "input_sha256": input_sha256,
            "bundle": self.slm.manifest.digest,
            "variant": self.slm.variant.name,
            "threads": self.slm.threads,
            "batch_size": self.batch_size,
            "version": edge_slm.__version__,
            **self.defaults,
            "seed": self.seed,
        }

    def answers(self, stream: BinaryIO, group: int, done: int = 0) -> Iterator[dict[str, Any]]:
        """Output records after the first `done` lines, computed `group` lines at a time."""
        lines = islice(_numbered(stream), done, None)
        while some := list(islice(lines, group)):
            rows = [self._row(number, line) for number, line in some]
            good = [row.request for row in rows if row.request]
            results = self.slm.generate_batch(good, self.batch_size)
            for row in rows:
                yield _failure(row, row.error) if row.error else _answer(row, next(results))

    def _row(self, number: int, line: bytes) -> InputLine:
        row = InputLine(number)
        try:
            data = _parse(line)
            row = replace(row, id=_id_of(data))
            _check_shape(data, _NEEDED if self.slm.manifest.prompt.schema else _NEEDED_OF_OTHERS)
            del data["id"]
            settings = {"seed": None, **self.defaults, **data}
            if settings["seed"] is None and settings["temperature"]:
                settings["seed"] = _seed_of(self.seed, number)
            request = edge_slm.Request(**settings)
            self.slm.check(request)
        except EdgeSlmError as error:
            return replace(row, error=error)
        return replace(row, request=request)


@click.command(short_help="Write prompts for a JSONL file.")
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write, resumable.  [default: stdout]",
)
@model_options
@sampling_options
@click.option("--seed", type=int, default=0, show_default=True, help="Of lines without their own.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Lines that are generated together.",
)
@json_option
def batch(
    *,
    source: Path,
    output: Path | None,
    bundle: Path | None,
    engine: str,
    precision: str,
    threads: int | None,
    seed: int,
    batch_size: int,
    as_json: bool,
    **defaults: Any,
) -> None:
    """Write one prompt for each line of INPUT (JSONL; '-' is stdin).

    A line is an object with 'id', 'request' and 'task' (null leaves it open; a model without
    commands has none), and optionally 'words', 'relevance', 'seed' and the sampling settings
    below, whose options are the defaults for lines without them. Answers come in input order;
    a line that cannot be used becomes {"line", "id", "error"} and the rest goes on (but an
    input with a line of more than 256 MiB, such as a device, is refused).

    With -o the run is resumable: killed at any moment and started again, it
    continues, and the file ends up as if it had never stopped. --json then prints
    a summary; without -o the output is JSON anyway.
    """
    with (
        edge_slm.load(bundle, engine=engine, precision=precision, threads=threads) as slm,
        _opened(source, copy_to=output and output.parent) as stream,
    ):
        if defaults["temperature"] and not slm.seeds:
            raise NotSupportedByEngine(
                "ctranslate2 has no seeds, so a sampled batch could not be continued",
                "use --engine onnxruntime, or temperature 0",
            )
        run = BatchRun(slm, defaults, seed, batch_size)
        if output is None:
            lines, bad = _to_stdout(run, stream)
        else:
            lines, bad = _to_file(run, stream, output)
    if as_json and output is not None:
        emit_json({"output": str(output), "lines": lines, "errors": bad})
    note(f"{lines} lines, {bad} of them errors")


def _to_stdout(run: BatchRun, stream: BinaryIO) -> tuple[int, int]:
    """(lines, errors). In small groups, so that a pipe gets its answers early."""
    lines = bad = 0
    with progress_bar(visible=not sys.stdout.isatty()) as progress:
        task = progress.add_task("writing", total=None)
        for answer in run.answers(stream, group=run.batch_size):
            click.echo(json_text(answer))
            progress.advance(task)
            lines, bad = lines + 1, bad + ("error" in answer)
    return lines, bad


def _to_file(run: BatchRun, stream: BinaryIO, output: Path) -> tuple[int, int]:
    """(lines, errors) of the whole file, of earlier runs too."""
    digest, total = _digest_and_count(stream)
    group = 4 * run.batch_size  # a crash repeats at most these; larger ones fill batches better
    with ResumableOutput(output, run.record(digest), group) as part, progress_bar() as progress:
        if part.complete:
            note(f"{output} is complete already")
        else:
            if part.count:
                note(f"continuing after line {part.count} of {total}")
            task = progress.add_task("writing", total=total, completed=part.count)
            for answer in run.answers(stream, group, done=part.count):
                part.append(answer)
                progress.advance(task)
            part.finish()
    with output.open("rb") as file:
        return total, sum("error" in json.loads(line) for line in file)


def _numbered(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of the lines that are not blank."""
    return ((number, line) for number, line in enumerate(read_lines(stream), 1) if line.strip())


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > LONGEST_LINE:
        raise DataError(f"longer than {LONGEST_LINE >> 20} MiB")
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a line of JSON: {error}") from None
    if not isinstance(data, dict):
        raise DataError("not a JSON object")
    return data


def _id_of(data: dict[str, Any]) -> str | int:
    name = data.get("id")
    if not isinstance(name, str | int):
        raise DataError("'id' must be there, a string or a whole number")
    if isinstance(name, str) and any("\ud800" <= char <= "\udfff" for char in name):
        raise DataError("'id' holds half a character", "write it as valid UTF-8")
    return name


def _check_shape(data: dict[str, Any], needed: Sequence[str]) -> None:
    if unknown := [key for key in data if key not in _KEYS]:
        raise DataError(f"unknown key {unknown[0]!r}", f"known: {', '.join(_KEYS)}")
    if missing := [key for key in needed if key not in data]:
        raise DataError(f"{missing[0]!r} is missing", f"needed: {', '.join(needed)}")
    if not isinstance(data.get("stop", ""), str | list):
        raise DataError("'stop' must be a text or a list of texts")
    if not isinstance(data.get("keep_length", True), bool):
        raise DataError("'keep_length' must be true or false")


def _seed_of(seed: int, line: int) -> int:
    """A seed from the run's seed and the line alone, so that a resumed run has the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{line}".encode()).digest()[:4], "big")


def _failure(row: InputLine, error: EdgeSlmError) -> dict[str, Any]:
    return {"line": row.line, "id": row.id, "error": {"code": error.code, "message": str(error)}}


def _answer(row: InputLine, result: edge_slm.Generation) -> dict[str, Any]:
    """No timings, so that two runs over the same input are equal."""
    return {
        "id": row.id,
        "text": result.text,
        "words": result.words,
        "task": result.asked.task,
        "relevance": result.asked.relevance,
        "asked_words": result.asked.words,
        "finish_reason": result.finish_reason,
        "in_tolerance": result.in_tolerance,
        "seed": result.seed,
        "warnings": list(result.warnings),
    }


def _digest_and_count(stream: BinaryIO) -> tuple[str, int]:
    """sha256 of the input and its number of lines that are not blank; rewinds it."""
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    stream.seek(0)
    total = sum(1 for _ in _numbered(stream))
    stream.seek(0)
    return digest.hexdigest(), total


@contextmanager
def _opened(source: Path, copy_to: Path | None) -> Iterator[BinaryIO]:
    """The input. For a resumable output a copy of it, which has no name, in the folder
    `copy_to`: what is computed must be what was hashed, whoever changes the file meanwhile."""
    with ExitStack() as stack:
        if str(source) == "-":
            stream: BinaryIO = sys.stdin.buffer
        else:
            try:
                stream = stack.enter_context(source.open("rb"))
            except OSError as error:
                raise DataError(f"cannot read {source}: {error.strerror}") from None
        if copy_to is not None:
            copy_to.mkdir(parents=True, exist_ok=True)
            copy = stack.enter_context(tempfile.TemporaryFile(dir=copy_to))
            copy_lines(stream, copy)
            copy.seek(0)
            stream = copy
        yield stream
