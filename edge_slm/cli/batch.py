"""`edge-slm batch`: a file of requests in, JSONL prompts out; resumable after a crash."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click

import edge_slm
from edge_slm.cli.batch_input import FORMATS, format_of, open_input
from edge_slm.cli.batch_run import BatchRun
from edge_slm.cli.console import (
    emit_json,
    examples,
    json_option,
    json_text,
    note,
    progress_bar,
    warn,
)
from edge_slm.cli.options import command_options, model_options, n_option, sampling_options
from edge_slm.cli.output import ResumableOutput, complete_output, put_in_place
from edge_slm_runtime.errors import BatchFailed, DataError, NotSupportedByEngine
from edge_slm_runtime.ranking import MOST


@dataclass(slots=True)
class Outcome:
    """Counts of output records. first: the first error, with its line."""

    lines: int = 0
    errors: int = 0
    repeated_ids: int = 0
    first: str = ""

    def add(self, record: Mapping[str, Any]) -> None:
        self.lines += 1
        self.repeated_ids += "repeats" in record
        if "error" in record:
            self.errors += 1
            self.first = self.first or f"line {record['line']}: {record['error']['message']}"

    def report(self, strict: bool) -> None:
        """On stderr. Raises BatchFailed when every line failed, or any and `strict`."""
        note(f"{self.lines} lines, {self.errors} of them errors")
        if self.repeated_ids:
            warn(f"{self.repeated_ids} lines have the id of an earlier line, which 'repeats' names")
        if self.errors and (strict or self.errors == self.lines):
            raise BatchFailed(
                f"{self.errors} of {self.lines} lines failed, the first on {self.first}"
            )


def _encoding(context: click.Context, option: click.Parameter, given: str | None) -> str | None:
    try:
        if given:
            "a".encode(given)
    except LookupError:
        raise click.BadParameter(f"{given!r} is no encoding of text such as cp1252") from None
    return given


@click.command(
    short_help="Write prompts for a file of requests.",
    epilog=examples(
        "batch requests.csv --task image --words 24 -o prompts.jsonl",
        "batch ideas.txt --task video --temperature 0.8 > prompts.jsonl",
        "batch requests.csv --task image --words 24 -o prompts.jsonl --retry-errors",
    ),
)
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write, resumable.  [default: stdout]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Of INPUT.  [default: by its ending, .csv, .tsv, .txt (lines); otherwise jsonl]",
)
@click.option(
    "--encoding",
    callback=_encoding,
    help="Of INPUT, such as cp1252.  [default: UTF-8, or UTF-16 where it is that]",
)
@model_options
@command_options
@sampling_options
@click.option(
    "--best-of",
    type=click.IntRange(1, MOST),
    default=1,
    show_default=True,
    help="Compute so many answers to a line, drawn at --temperature, or at 0.5, and keep the best.",
)
@n_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of lines without their own.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Lines that are generated together.",
)
@click.option("--strict", is_flag=True, help="Exit 13 when any line failed, not only when all did.")
@click.option(
    "--retry-errors",
    is_flag=True,
    help="Compute the lines again that failed in the complete --output, and keep its answers.",
)
@json_option
def batch(
    *,
    source: Path,
    output: Path | None,
    form: str | None,
    encoding: str | None,
    bundle: Path,
    engine: str,
    precision: str,
    threads: int | None,
    n: int,
    seed: int,
    batch_size: int,
    strict: bool,
    retry_errors: bool,
    as_json: bool,
    **defaults: Any,
) -> None:
    """Write one prompt for each line of INPUT: JSONL, CSV, TSV or plain text ('-' is stdin).

    A line has a 'request', and optionally an 'id', 'task', 'words', 'relevance', 'seed', 'n' and
    the sampling settings below; the options are the defaults for lines without their own. In
    CSV and TSV the first line names the columns, and a cell of 'ban', 'keep' or 'choices' may
    have several texts, divided by '|'; in plain text a line is the request. Other keys and
    columns come back with the answer. INPUT may be compressed with gzip.

    Answers are JSONL in UTF-8, in input order; a line that cannot be used becomes
    {"line", "id", "request", "error"} and the rest goes on (but an input with a line of more
    than 256 MiB, such as a device, is refused). A line may have 256 KiB.

    With -o the run is resumable: killed at any moment and started again, it
    continues, and the file ends up as if it had never stopped. --json then prints
    a summary; without -o the output is JSON anyway.
    """
    if retry_errors and output is None:
        raise click.UsageError("--retry-errors needs the --output of an earlier run")
    if output is not None and output.exists() and source.exists() and output.samefile(source):
        raise click.UsageError("the --output is the INPUT itself")
    with (
        edge_slm.load(bundle, engine=engine, precision=precision, threads=threads) as slm,
        open_input(source, copy_to=output and output.parent) as stream,
    ):
        _check_defaults(slm, defaults)
        run = BatchRun(slm, form or format_of(source), encoding, defaults, n, seed, batch_size)
        if output is None:
            outcome = _to_stdout(run, stream)
        else:
            outcome = _to_file(run, stream, output, retry_errors)
    if as_json and output is not None:
        counts = {"lines": outcome.lines, "errors": outcome.errors}
        emit_json({"output": str(output), **counts, "repeated_ids": outcome.repeated_ids})
    outcome.report(strict)


def _check_defaults(slm: edge_slm.SLM, defaults: dict[str, Any]) -> None:
    """Raises what otherwise each line would. As `SLM.check`."""
    if defaults["temperature"] and not slm.seeds:
        raise NotSupportedByEngine(
            "ctranslate2 has no seeds, so a sampled batch could not be continued",
            "use --engine onnxruntime, or temperature 0",
        )
    slm.check(edge_slm.Request("any", **defaults))


def _to_stdout(run: BatchRun, stream: BinaryIO) -> Outcome:
    """In small groups, so that a pipe gets its answers early."""
    outcome = Outcome()
    with progress_bar(visible=not sys.stdout.isatty()) as progress:
        task = progress.add_task("writing", total=None)
        for answer in run.answers(stream, group=run.batch_size):
            click.echo(json_text(answer).encode())  # bytes: UTF-8 whatever the locale is
            progress.advance(task)
            outcome.add(answer)
    return outcome


def _to_file(run: BatchRun, stream: BinaryIO, output: Path, retry: bool) -> Outcome:
    """Of the whole file, of earlier runs too."""
    digest, total = _digest_and_count(run, stream)
    record, target, earlier = run.record(digest), output, {}
    if retry:
        record["kept_sha256"] = complete_output(output)
        _check_kept(run, stream, output, total)
        target = output.with_name(f"{output.name}.retry")
        earlier["earlier"] = _records(output)
    group = 4 * run.batch_size  # a crash repeats at most these; larger ones fill batches better
    try:
        with ResumableOutput(target, record, group) as part, progress_bar() as progress:
            if part.complete:
                note(f"{output} is complete already")
            else:
                if part.count:
                    note(f"continuing after line {part.count} of {total}")
                task = progress.add_task("writing", total=total, completed=part.count)
                for answer in run.answers(stream, group, done=part.count, **earlier):
                    part.append(answer)
                    progress.advance(task)
                part.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command continues {output}") from None
    if retry:
        put_in_place(target, output)
    outcome = Outcome()
    for answer in _records(output):
        outcome.add(answer)
    return outcome


def _records(output: Path) -> Iterator[dict[str, Any]]:
    with output.open("rb") as file:
        yield from map(json.loads, file)


def _check_kept(run: BatchRun, stream: BinaryIO, output: Path, total: int) -> None:
    """Raises DataError when an answer in `output` is to another request than its row."""
    if total != (count := sum(1 for _ in _records(output))):
        raise DataError(
            f"{output} has {count} answers and errors, the input {total} lines",
            "errors can be computed again where lines were changed, none added or left out",
        )
    for row, old in zip(run.rows(stream), _records(output), strict=True):
        if "error" not in old and (old["id"], old["request"]) != (
            row.id,
            row.fields.get("request"),
        ):
            raise DataError(
                f"line {row.line} of the input is another than the one that was answered",
                "change only lines that failed, or give another output",
            )
    stream.seek(0)


def _digest_and_count(run: BatchRun, stream: BinaryIO) -> tuple[str, int]:
    """sha256 of the input and its number of rows; rewinds it."""
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    stream.seek(0)
    total = sum(1 for _ in run.rows(stream))
    stream.seek(0)
    return digest.hexdigest(), total
