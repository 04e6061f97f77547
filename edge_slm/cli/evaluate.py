"""`edge-slm evaluate`: does a bundle obey its commands?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import edge_slm
from edge_slm.cli.console import emit_json, json_option, reporter, stdout_console
from edge_slm.cli.options import model_options
from edge_slm_runtime.errors import DataError


@click.command(short_help="Measure command adherence on held-out requests.")
@model_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="The samples that the model was trained on; their held-out requests are used.",
)
@click.option("--task", "tasks", multiple=True, default=("image", "video"), show_default=True)
@click.option("--requests", type=click.IntRange(min=2), default=200, show_default=True)
@json_option
def evaluate(
    *,
    bundle: Path | None,
    engine: str,
    precision: str,
    threads: int | None,
    data: tuple[Path, ...],
    tasks: tuple[str, ...],
    requests: int,
    as_json: bool,
) -> None:
    """Command lengths and relevance levels on held-out requests; compare with the references.

    Needs the [train] extra, for the relevance scorer.
    """
    from edge_slm.distill.evaluate import evaluate as run
    from edge_slm.distill.samples import held_out_samples

    with (
        edge_slm.load(bundle, engine=engine, precision=precision, threads=threads) as slm,
        reporter() as report,
    ):
        recipe = slm.manifest.provenance.get("recipe")
        if not recipe:
            raise DataError("the bundle does not say what was held out", "convert a trained model")
        percent = recipe["recipe"]["data"]["holdout_percent"]
        result = run(slm, held_out_samples(data, tasks, requests, percent), report=report)
    if as_json:
        emit_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Two tables: commanded lengths, commanded relevance."""
    from rich.table import Table

    console = stdout_console()
    tasks = " and ".join(result["tasks"])
    table = Table(
        title=f"Length: {result['requests']} held-out {tasks} requests, {result['variant']}"
    )
    for column in ("words asked", "within tolerance", "mean abs. error", "", ""):
        table.add_column(column, justify="right")
    table.columns[3].header, table.columns[4].header = "with the promise", "mean abs. error"
    alone, promise = result["length"]["model alone"], result["length"]["with the promise"]
    rows = [(str(w), alone["by_length"][w], promise["by_length"][w]) for w in alone["by_length"]]
    for name, a, p in [*rows, ("all", alone, promise)]:
        table.add_row(
            name,
            f"{a['in_tolerance']:.1%}",
            f"{a['mean_absolute_error']:.2f}",
            f"{p['in_tolerance']:.1%}",
            f"{p['mean_absolute_error']:.2f}",
        )
    table.add_row("Spearman", f"{alone['spearman']:.3f}", "", f"{promise['spearman']:.3f}", "")
    console.print(table)

    table = Table(title="Relevance (MiniLM cosine) at the references' lengths")
    for column in (
        "level asked",
        "relevance",
        "± s.e.",
        "÷ references",
        "distinct-2",
        "request kept",
    ):
        table.add_column(column, justify="right")
    teacher = result["teacher"]
    for row in [*result["relevance"], {"level": "references", **teacher}]:
        table.add_row(
            "any" if row["level"] is None else str(row["level"]),
            f"{row['relevance']:.3f}",
            f"{row['standard_error']:.3f}",
            f"{row['relevance'] / teacher['relevance']:.3f}",
            f"{row['distinct_2']:.3f}",
            f"{row['request_words_kept']:.1%}",
        )
    console.print(table)
    console.print(f"Spearman(level, mean relevance) {result['relevance_spearman']:.3f}")
