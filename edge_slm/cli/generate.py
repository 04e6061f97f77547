"""`edge-slm generate`: one request."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

import edge_slm
from edge_slm.cli.console import (
    emit_json,
    examples,
    json_option,
    note,
    printable,
    read_request,
    warn,
)
from edge_slm.cli.options import (
    command_options,
    model_options,
    n_option,
    sampling_options,
)
from edge_slm_runtime.engines import engine_class
from edge_slm_runtime.ranking import MOST

_BEST_OF = 8


@click.command(
    short_help="Write one prompt.",
    epilog=examples(
        'generate "a fox crossing a frozen river" --task video --words 40',
        'generate "a jazz concert" --task design --temperature 0.8 --seed 7 --json',
        'generate "a jazz concert" --task image --n 4 --ban crowd --ban "neon sign"',
        "generate - --task image < request.txt",
    ),
)
@click.argument("request")
@model_options
@command_options
@sampling_options
@click.option(
    "--best-of",
    type=click.IntRange(1, MOST),
    help="Compute so many answers, drawn at --temperature, or at 0.5, and print the best; 1 prints "
    f"one as it comes.  [default: {_BEST_OF}; 1 with ctranslate2, choices or a deadline]",
)
@n_option
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--deadline-ms", type=float, help="End after so long, with the text until then.")
@json_option
def generate(
    *,
    request: str,
    bundle: Path,
    engine: str,
    precision: str,
    threads: int | None,
    n: int,
    best_of: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write one prompt for REQUEST, or for the text on stdin when it is '-'."""
    text = read_request(request)
    with edge_slm.load(bundle, engine=engine, precision=precision, threads=threads) as slm:
        if best_of is None:
            one = settings["choices"] or settings["deadline_ms"] is not None
            able = engine_class(slm.variant.engine).constrains
            best_of = _BEST_OF if able and not one else 1
        if n > 1:
            _print_variations(slm.variations(text, n, best_of=best_of, **settings), as_json)
            return
        if as_json:
            emit_json(slm.generate(text, best_of=best_of, **settings).as_dict())
            return
        if best_of > 1:
            result = slm.generate(text, best_of=best_of, **settings)
            click.echo(_shown(result.text))
        else:
            stream = slm.stream(text, **settings)
            for piece in stream:
                click.echo(_shown(piece), nl=False)
            click.echo()
            result = stream.result
    for warning in result.warnings:
        warn(warning)
    stats = result.stats
    asked = f" of {result.asked.words} asked" if result.asked.words else ""
    if best_of > 1:  # of a row among others, whose speed is no one's
        head, speed = f"the best of {best_of} in {stats.total_ms:.0f} ms, ", ""
        if result.confidence is not None:
            head += f"confidence {result.confidence:.2f}, "
    else:
        tpot = f", {stats.tpot_ms:.1f} ms/token" if stats.tpot_ms is not None else ""
        head = ""
        speed = f"TTFT {stats.ttft_ms:.0f} ms{tpot}, {stats.tokens_per_second:.0f} tokens/s, "
    note(
        f"{slm.manifest.name}: {head}{result.words} words{asked}, ended by {result.finish_reason}; "
        f"{stats.engine} {stats.precision}, {stats.threads} threads: load {stats.load_ms:.0f} ms, "
        f"{speed}peak {stats.peak_rss_mb:.0f} MB"
    )
    if bundle == edge_slm.shipped_bundle():
        note(
            "this is the small model for tests and benchmarks; prompts to use come from "
            "prompts-115m: pip install ./models/prompts-115m"
        )


def _shown(text: str) -> str:
    """As it is into a file; a terminal must not obey what a model writes."""
    return printable(text) if sys.stdout.isatty() else text


def _print_variations(answers: list[edge_slm.Generation], as_json: bool) -> None:
    """A text a line, the best first; with `as_json` a list of all about them."""
    if as_json:
        emit_json([answer.as_dict() for answer in answers])
        return
    for answer in answers:
        click.echo(_shown(" ".join(answer.text.split())))
        note(f"score {answer.score:.2f}, {answer.words} words, seed {answer.seed}")
    for warning in answers[0].warnings:
        warn(warning)
