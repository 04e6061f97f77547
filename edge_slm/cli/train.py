"""`edge-slm train`: from samples and a recipe to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edge_slm.cli.console import emit_json, json_option, reporter
from edge_slm.cli.options import folder


@click.command(short_help="Train a checkpoint from samples and a recipe.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="JSONL file of samples, or a folder of them; may be repeated.",
)
@click.option("--out", type=folder, required=True, help="Folder of the run; a run in it continues.")
@click.option("--cache", type=folder, help="Folder of cached embeddings (default: OUT/cache).")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after this many more steps.")
@json_option
def train(
    *,
    recipe: Path,
    data: tuple[Path, ...],
    out: Path,
    cache: Path | None,
    max_steps: int | None,
    as_json: bool,
) -> None:
    """Train what RECIPE (TOML) describes on samples of request, response and task.

    Prints the checkpoint's folder; --json adds the last line of the metrics. A stopped
    or killed run continues where it last saved, to the same result.
    """
    from edge_slm.distill.recipe import Recipe
    from edge_slm.distill.train import train as run

    with reporter() as report:
        done = run(Recipe.read(recipe), data, out, cache=cache, report=report, max_steps=max_steps)
    if as_json:
        last = (out / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
        emit_json({"written": str(done), **json.loads(last)})
    else:
        click.echo(done)
