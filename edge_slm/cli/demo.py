"""`edge-slm demo`: from a checkpoint to commanded prompts, with figures."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click

import edge_slm
from edge_slm.cli.console import emit_json, json_option, note, progress_bar, stdout_console
from edge_slm.cli.convert import convert_with_bar
from edge_slm.cli.options import folder, threads_option
from edge_slm_runtime.bundle import read_manifest
from edge_slm_runtime.errors import DependencyMissing, EngineNotInstalled

Cell = dict[str, Any]  # a variant's `Spec`, and what it answered

REFERENCE = Path(edge_slm.__file__).parents[1] / "models" / "reference"

# (task, request, words); those that the model does not support are left out.
REQUESTS = (
    ("image", "a red fox in the snow", 12),
    ("image", "a red fox in the snow", 24),
    ("image", "a red fox in the snow", 48),
    ("video", "a small boat crossing a lake at dawn", 30),
    ("video", "a small boat crossing a lake at dawn", 80),
    ("lettering", "Fresh Bread Every Morning", 25),
    ("scene", "dog, ball, park, child", 10),
    ("tags", "Lighthouse at Dusk (oil paint on canvas)", 6),
    ("title", "oil paint on canvas; harbour, boat, sea, moon", 4),
)


@click.command(short_help="Convert the reference model and watch it obey.")
@click.option("--checkpoint", type=folder, help="Convert this one.  [default: models/reference]")
@threads_option
@json_option
def demo(checkpoint: Path | None, threads: int | None, as_json: bool) -> None:
    """Convert the reference checkpoint to every variant in a temporary folder, ask
    each for prompts of several tasks and lengths, and print the texts and figures.

    Each variant runs in a fresh process. Where there is no checkpoint, or the
    [convert] extra is missing, the bundle that comes with the package is used.
    """
    with tempfile.TemporaryDirectory(prefix="edge-slm-demo-") as scratch:
        bundle = _bundle(checkpoint, Path(scratch))
        cells = _measured(bundle, threads)
    if as_json:
        from edge_slm_bench.machine import machine

        emit_json({"machine": machine().as_dict(), "cells": cells})
    else:
        _print(cells)


def _bundle(checkpoint: Path | None, scratch: Path) -> Path:
    """Every variant of the checkpoint, or the shipped bundle with the reason on stderr."""
    if checkpoint is None and not REFERENCE.is_dir():
        note(f"no checkpoint at {REFERENCE}: using the bundle that comes with the package")
        return edge_slm.shipped_bundle()
    try:
        from edge_slm_converters.variants import VARIANTS

        runnable = [name for name, target in VARIANTS.items() if find_spec(target.engine)]
        out = scratch / "demo"
        # It ships nothing, so it shows whatever the fidelity is.
        convert_with_bar(checkpoint or REFERENCE, out, runnable, accept=True)
    except DependencyMissing as error:
        if checkpoint is not None:
            raise
        note(f"{error}: using the bundle that comes with the package")
        return edge_slm.shipped_bundle()
    return out


def _measured(bundle: Path, threads: int | None) -> list[Cell]:
    from edge_slm_bench.process import launch
    from edge_slm_bench.runners.edge_slm import spec_of

    manifest = read_manifest(bundle)
    schema = manifest.prompt.grammar
    top = schema.levels - 1
    requests = [
        {"request": text, "task": task, "words": words, "relevance": top}
        for task, text, words in REQUESTS
        if task in schema.tasks and 2 * words + 48 <= manifest.model.positions
    ]
    job = {"kind": "answers", "threads": threads, "requests": requests}
    cells = []
    with progress_bar() as progress:
        task = progress.add_task("generating", total=len(manifest.variants))
        for variant in manifest.variants:
            progress.update(task, description=f"generating with {variant.name}")
            spec = spec_of(bundle, variant).as_dict()
            try:
                cells.append({**spec, **launch({**job, "spec": spec})})
            except EngineNotInstalled as error:
                note(f"{variant.name} skipped: {error}")
            progress.advance(task)
    return cells


def _print(cells: Sequence[Cell]) -> None:
    from rich.markup import escape
    from rich.table import Table

    shown = next((cell for cell in cells if cell["precision"] == "int8"), cells[0])
    console = stdout_console()
    console.print(f"[bold]{escape(shown['variant'])}[/bold] answers")
    for answer in shown["answers"][0]:
        asked = answer["asked"]
        console.print(
            f"\n[bold]{escape(asked['task'])}[/bold], {asked['words']} words: "
            f"{escape(answer['request'])}"
            f"  [dim]→ {answer['words']} words, ended by {answer['finish_reason']}[/dim]"
        )
        console.print(f"  {answer['text']}", markup=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("variant")
    table.add_column("words asked→got")
    for heading in ("load ms", "TTFT ms", "ms/token", "tokens/s", "peak RSS MB", "disk MB"):
        table.add_column(heading, justify="right")
    for cell in cells:
        (answers,) = cell["answers"]
        stats = [answer["stats"] for answer in answers]
        per_token = median(s["tpot_ms"] for s in stats if s["tpot_ms"])
        table.add_row(
            escape(cell["variant"]),
            " ".join(f"{a['asked']['words']}→{a['words']}" for a in answers),
            f"{cell['load_ms']:.0f}",
            f"{median(s['ttft_ms'] for s in stats):.1f}",
            f"{per_token:.2f}",
            f"{1000 / per_token:.0f}",
            f"{cell['peak_rss_mb']:.0f}",
            f"{cell['disk_bytes'] / 1e6:.1f}",
        )
    console.print()
    console.print(table)
