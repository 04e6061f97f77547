"""`edge-slm profile`: memory and latency of every variant of a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edge_slm.cli.console import emit_json, json_option, progress_bar, stdout_console
from edge_slm.cli.options import folder, threads_option


@click.command(short_help="Measure memory and latency of a bundle.")
@click.argument("bundle", type=folder)
@threads_option
@click.option("--variants", help="Comma-separated names.  [default: all]")
@click.option(
    "--repetitions",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Fresh processes per variant, taken in turn.",
)
@json_option
def profile(
    *, bundle: Path, threads: int | None, variants: str | None, repetitions: int, as_json: bool
) -> None:
    """Measure each variant of BUNDLE in a fresh process: load time, time to first
    token, milliseconds per token, peak memory, size on disk (medians)."""
    from edge_slm_bench.machine import machine
    from edge_slm_bench.report import speed_table
    from edge_slm_bench.speed import measure_interleaved
    from edge_slm_runtime.bundle import read_manifest

    names = variants.split(",") if variants else [v.name for v in read_manifest(bundle).variants]
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(names) * repetitions)
        cells = measure_interleaved(
            [(bundle, name) for name in names],
            repetitions=repetitions,
            threads=threads,
            done=lambda cell: progress.advance(task),
        )
    if as_json:
        emit_json({"machine": machine().as_dict(), "cells": [cell.as_dict() for cell in cells]})
    else:
        stdout_console().print(speed_table(cells))
