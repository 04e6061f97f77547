"""Several bundles and variants side by side: `python -m edge_slm_bench.speed BUNDLE…`.

Each cell runs in a fresh process, and the cells take turns: a machine that gets
warmer or busier slows all of them, not the last ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from edge_slm_bench.machine import machine
from edge_slm_bench.measure import NEW_TOKENS, Measurement, measure_variant
from edge_slm_bench.report import speed_table
from edge_slm_runtime.bundle import read_manifest
from edge_slm_runtime.errors import EdgeSlmError


def measure_interleaved(
    cells: Sequence[tuple[Path, str]],
    *,
    repetitions: int,
    threads: int | None = None,
    new_tokens: int = NEW_TOKENS,
    done: Callable[[str], None] = lambda cell: None,
) -> list[Measurement]:
    """Measures (bundle, variant) cells in turn, `repetitions` times; raises as `measure_variant`.

    done: called with the cell's name after each process.
    """
    measured: dict[tuple[Path, str], Measurement] = {}
    for _ in range(repetitions):
        for cell in cells:
            bundle, variant = cell
            sample = measure_variant(bundle, variant, threads=threads, new_tokens=new_tokens)
            measured[cell] = measured[cell].with_samples_of(sample) if cell in measured else sample
            done(f"{bundle.name}/{variant}")
    return list(measured.values())


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--repetitions", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print every sample, and the machine.")
def main(bundles: tuple[Path, ...], repetitions: int, threads: int, as_json: bool) -> None:
    """Measure every variant of BUNDLES in one interleaved run."""
    try:
        cells = [(bundle, v.name) for bundle in bundles for v in read_manifest(bundle).variants]
        results = measure_interleaved(
            cells,
            repetitions=repetitions,
            threads=threads,
            done=lambda cell: click.echo(f"measured {cell}", err=True),
        )
    except EdgeSlmError as error:
        click.echo(f"error[{error.code}]: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    record = machine()
    if as_json:
        cells_json = [cell.as_dict() for cell in results]
        click.echo(json.dumps({"machine": record.as_dict(), "cells": cells_json}, indent=2))
        return
    from rich.console import Console

    Console(width=160, highlight=False).print(speed_table(results))
    click.echo(
        f"\n{record.cpu}, {record.usable_cores} of {record.cores} cores, {threads} threads, "
        f"median of {repetitions} fresh processes in turn; onnxruntime "
        f"{record.packages.get('onnxruntime')}, ctranslate2 {record.packages.get('ctranslate2')}"
    )


if __name__ == "__main__":
    main()
