"""`edge-slm distill`: from a teacher or samples to an evaluated checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_slm.cli.console import emit_json, json_option, note, reporter
from edge_slm.cli.options import folder

if TYPE_CHECKING:
    from edge_slm.distill.prepare import Report
    from edge_slm.distill.recipe import Recipe

paths = click.Path(path_type=Path)


@click.command(short_help="Train a model from a teacher or samples, and evaluate it.")
@click.argument("recipe", type=paths)
@click.option(
    "--data",
    type=paths,
    multiple=True,
    help="JSONL file of samples, or a folder of them; may be repeated.",
)
@click.option(
    "--text", type=paths, multiple=True, help="General text (.txt, .txt.xz) or a folder of it."
)
@click.option("--out", type=folder, required=True, help="Folder of the run; a run in it continues.")
@click.option("--init", help="GPT-2 checkpoint to start from: a folder or a name on the hub.")
@click.option(
    "--server",
    envvar="OPENAI_BASE_URL",
    help="Address of the OpenAI-compatible server of teacher and judge.",
)
@click.option("--cache", type=folder, help="Folder of cached rewards (default: OUT/cache).")
@click.option("--plain-baseline", is_flag=True, help="Train and evaluate a model without commands.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after this many more steps.")
@click.option(
    "--requests",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Held-out requests to evaluate on; 0: stop at the checkpoint.",
)
@json_option
def distill(
    *,
    recipe: Path,
    data: tuple[Path, ...],
    text: tuple[Path, ...],
    out: Path,
    init: str | None,
    server: str | None,
    cache: Path | None,
    plain_baseline: bool,
    max_steps: int | None,
    requests: int,
    as_json: bool,
) -> None:
    """Upside-down reinforcement learning as RECIPE (TOML) describes it.

    Teacher, rewards, training, exploration rounds, checkpoint, bundle, evaluation: all
    in the folder OUT. A stopped or killed run continues where it last saved, to the same
    result. Prints the evaluation (--json: all of it); with --requests 0 the
    checkpoint's folder.
    """
    from edge_slm.distill.loop import distill as run
    from edge_slm.distill.recipe import Recipe

    settings = Recipe.read(recipe)
    if init:
        settings = settings.with_init(init)
    runs = {out: settings}
    if plain_baseline:
        runs[out / "plain"] = settings.plain()
    done = []
    with reporter() as report:
        for folder_, settings_ in runs.items():
            done.append(
                run(
                    settings_,
                    data,
                    folder_,
                    text=text,
                    cache=cache or out / "cache",
                    server=server,
                    report=report,
                    max_steps=max_steps,
                )
            )
        if requests and all(path.name == "checkpoint" for path in done):
            written = [*data, *([out / "teacher.jsonl"] if settings.teacher else [])]
            result = _evaluated(settings, written, list(runs), requests, report)
            if as_json:
                emit_json(result)
            return
    if as_json:
        emit_json({"written": str(done[0])})
    else:
        click.echo(done[0])


def _evaluated(
    recipe: Recipe, data: Sequence[Path], runs: Sequence[Path], requests: int, report: Report
) -> dict[str, Any]:
    """Bundles of the runs and the evaluation of the first, unless they are there."""
    raise NotImplementedError
