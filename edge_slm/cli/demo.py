"""`edge-slm demo`: commanded prompts of the installed models and of a converted checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

import edge_slm
from edge_slm.cli.console import (
    emit_json,
    examples,
    json_option,
    note,
    progress_bar,
    stdout_console,
)
from edge_slm.cli.convert import convert_with_bar
from edge_slm.cli.options import folder, threads_option
from edge_slm_runtime.bundle import Manifest, read_manifest
from edge_slm_runtime.engines import engine_class
from edge_slm_runtime.errors import DependencyMissing, EngineNotInstalled

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Cell = dict[str, Any]  # its model's name, a variant's `Spec`, and what it answered

REFERENCE = Path(edge_slm.__file__).parents[1] / "models" / "reference"

# (task, request, words); a model is asked the first of them that it supports.
REQUESTS = (
    ("image", "a red fox in the snow", 24),
    ("video", "a small boat crossing a lake at dawn", 40),
    ("design", "Design a poster for a jazz concert in the park", 50),
    ("lettering", "Fresh Bread Every Morning", 24),
    ("scene", "dog, ball, park, child", 12),
    ("tags", "lighthouse", 6),
)
ASKED = 4  # of a model
BEST_OF = 8  # answers to a request; the best one is shown
NEXT = (
    'edge-slm generate "a red fox in the snow" --task image --words 24',
    "edge-slm batch requests.csv --task image -o prompts.jsonl",
    "edge-slm info",
    "edge-slm profile",
)


@click.command(
    short_help="Ask the installed models, convert the reference model, compare.",
    epilog=examples("demo", "demo --checkpoint models/reference --threads 1 --json"),
)
@click.option("--checkpoint", type=folder, help="Convert this one.  [default: models/reference]")
@threads_option
@json_option
def demo(checkpoint: Path | None, threads: int | None, as_json: bool) -> None:
    """Ask each installed model for prompts of several tasks and lengths; convert the
    reference checkpoint to every variant in a temporary folder, and ask these too.
    Print the texts of the installed models, or without one those of the reference
    model, each the best of eight; then the figures of all variants, for one answer each.

    Each variant runs in a fresh process. Where there is no checkpoint, or the
    [convert] extra is missing, the bundle that comes with the package is used.
    With --checkpoint, that one alone is converted and asked.
    """
    installed = [] if checkpoint else _installed()
    with tempfile.TemporaryDirectory(prefix="edge-slm-demo-") as scratch:
        bundles = [*installed, _bundle(checkpoint, Path(scratch))]
        cells = [_measured(bundle, threads) for bundle in bundles]
    if as_json:
        from edge_slm_bench.machine import machine

        emit_json({"machine": machine().as_dict(), "cells": list(chain(*cells))})
    else:
        _print([some for some in cells[:-1] if some] or cells[-1:], list(chain(*cells)))


def _installed() -> list[Path]:
    """The installed models that can be asked."""
    manifests = {path: read_manifest(path) for path in edge_slm.installed_models().values()}
    return [path for path, m in manifests.items() if m.prompt.schema and _requests(m)]


def _requests(manifest: Manifest) -> list[dict[str, Any]]:
    """Raises NoCommandGrammar."""
    schema = manifest.prompt.grammar
    return [
        {"request": text, "task": task, "words": words, "relevance": schema.levels - 1}
        for task, text, words in REQUESTS
        if task in schema.tasks and 2 * words + 48 <= manifest.model.positions
    ][:ASKED]


def _bundle(checkpoint: Path | None, scratch: Path) -> Path:
    """Every variant of the checkpoint, or the shipped bundle with the reason on stderr."""
    if checkpoint is None and not REFERENCE.is_dir():
        note(f"no checkpoint at {REFERENCE}: using the bundle that comes with the package")
        return edge_slm.shipped_bundle()
    try:
        from edge_slm_converters.variants import VARIANTS

        runnable = [name for name, target in VARIANTS.items() if find_spec(target.engine)]
        source = checkpoint or REFERENCE
        out = scratch / "bundle"
        # It ships nothing, so it shows whatever the fidelity is.
        convert_with_bar(source, out, runnable, name=source.name, accept=True)
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
    requests = _requests(manifest)
    best = [{**request, "best_of": BEST_OF} for request in requests]
    cells = []
    with progress_bar() as progress:
        task = progress.add_task("generating", total=len(manifest.variants))
        for variant in manifest.variants:
            progress.update(task, description=f"generating with {variant.name}")
            spec = spec_of(bundle, variant).as_dict()
            asked = [*requests, *best] if engine_class(variant.engine).constrains else requests
            job = {"kind": "answers", "threads": threads, "requests": asked, "spec": spec}
            try:
                answered = launch(job)
                (answers,) = answered.pop("answers")
                texts = answers[-len(requests) :]
                answers = answers[: len(requests)]
                cells.append(
                    {"model": manifest.name, **spec, **answered, "answers": answers, "best": texts}
                )
            except EngineNotInstalled as error:
                note(f"{variant.name} skipped: {error}")
            progress.advance(task)
    return cells


def _print(shown: Sequence[Sequence[Cell]], cells: Sequence[Cell]) -> None:
    """The texts of each model in `shown`, and the figures of all variants."""
    console = stdout_console()
    for variants in shown:
        _print_answers(console, variants)
    console.print(_table(cells))
    console.print("\nnext:")
    for command in NEXT:
        console.print(f"  {command}", markup=False)


def _print_answers(console: Console, cells: Sequence[Cell]) -> None:
    """Those of one variant, of an int8 one where there is one: it is closest to the model."""
    from rich.markup import escape

    shown = next((cell for cell in cells if cell["precision"] == "int8"), cells[0])
    console.print(f"[bold]{escape(shown['model'])}[/bold] ({escape(shown['variant'])}) answers")
    for answer in shown["best"]:
        asked = answer["asked"]
        console.print(
            f"\n[bold]{escape(asked['task'])}[/bold], {asked['words']} words: "
            f"{escape(answer['request'])}"
            f"  [dim]→ {answer['words']} words, ended by {answer['finish_reason']}[/dim]"
        )
        console.print(f"  {answer['text']}", markup=False)
    console.print()


def _table(cells: Sequence[Cell]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    table.add_column("variant")
    table.add_column("words asked→got")
    for heading in ("load ms", "TTFT ms", "ms/token", "tokens/s", "peak RSS MB", "disk MB"):
        table.add_column(heading, justify="right")
    for cell in cells:
        answers = cell["answers"]
        stats = [answer["stats"] for answer in answers]
        per_token = median(s["tpot_ms"] for s in stats if s["tpot_ms"])
        table.add_row(
            escape(cell["model"]),
            escape(cell["variant"]),
            " ".join(f"{a['asked']['words']}→{a['words']}" for a in answers),
            f"{cell['load_ms']:.0f}",
            f"{median(s['ttft_ms'] for s in stats):.1f}",
            f"{per_token:.2f}",
            f"{1000 / per_token:.0f}",
            f"{cell['peak_rss_mb']:.0f}",
            f"{cell['disk_bytes'] / 1e6:.1f}",
        )
    return table
