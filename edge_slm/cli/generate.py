"""`edge-slm generate`: one request, streamed to the terminal."""

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
from edge_slm.cli.options import command_options, model_options, n_option, sampling_options


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
@n_option
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--deadline-ms", type=float, help="End after so long, with the text until then.")
@json_option
def generate(
    *,
    request: str,
    bundle: Path | None,
    engine: str,
    precision: str,
    threads: int | None,
    n: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write one prompt for REQUEST, or for the text on stdin when it is '-'."""
    text = read_request(request)
    with edge_slm.load(bundle, engine=engine, precision=precision, threads=threads) as slm:
        if n > 1:
            _print_variations(slm.variations(text, n, **settings), as_json)
            return
        if as_json:
            emit_json(slm.generate(text, **settings).as_dict())
            return
        stream = slm.stream(text, **settings)
        for piece in stream:
            click.echo(_shown(piece), nl=False)
        click.echo()
        result = stream.result
    for warning in result.warnings:
        warn(warning)
    stats = result.stats
    asked = f" of {result.asked.words} asked" if result.asked.words else ""
    tpot = f", {stats.tpot_ms:.1f} ms/token" if stats.tpot_ms is not None else ""
    note(
        f"{result.words} words{asked}, ended by {result.finish_reason}; "
        f"{stats.engine} {stats.precision}, {stats.threads} threads: load {stats.load_ms:.0f} ms, "
        f"TTFT {stats.ttft_ms:.0f} ms{tpot}, {stats.tokens_per_second:.0f} tokens/s, "
        f"peak {stats.peak_rss_mb:.0f} MB"
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
