"""`edge-slm distill`: from a teacher or samples to an evaluated checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from edge_slm.cli.console import emit_json, examples, json_option, note, reporter, stdout_console
from edge_slm.cli.convert import convert_with_bar, held_out_examples
from edge_slm.cli.evaluate import measure
from edge_slm.cli.options import folder

paths = click.Path(path_type=Path)


@click.command(
    short_help="Train a model from a teacher or samples, and evaluate it.",
    epilog=examples(
        "distill recipes/grammar.toml --out runs/mine",
        "distill recipes/reference.toml --data samples.jsonl --out runs/reference",
    ),
)
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
@click.option("--init", help="Start from a checkpoint: a folder, a GGUF file or a hub name.")
@click.option(
    "--teacher-checkpoint",
    type=folder,
    help="Checkpoint of a larger model with the same commands, to learn from token by token.",
)
@click.option(
    "--server",
    envvar="OPENAI_BASE_URL",
    help="Address of the OpenAI-compatible server of teacher and judge.",
)
@click.option(
    "--cache", type=folder, help="Folder of cached rewards and soft labels (default: OUT/cache)."
)
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
    teacher_checkpoint: Path | None,
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
    samples = list(data)
    done: dict[Path, Path] = {}
    with reporter() as report:
        for place, what in runs.items():
            done[place] = run(
                what,
                samples,
                place,
                text=text,
                cache=cache or out / "cache",
                server=server,
                teacher_checkpoint=teacher_checkpoint,
                report=report,
                max_steps=max_steps,
            )
            if settings.teacher and place == out:
                samples.append(out / "teacher.jsonl")
    if not _is_first_process():
        return
    finished = all(path.name == "checkpoint" for path in done.values())
    if requests and finished:
        _print(_evaluated(runs, samples, requests, server), out, as_json)
    elif as_json:
        emit_json({"written": str(done[out])})
    else:
        click.echo(done[out])


def _print(result: dict[str, Any], out: Path, as_json: bool) -> None:
    from edge_slm.distill.evaluate import show

    if as_json:
        emit_json(result)
        return
    show(result, stdout_console())
    note(f"{out / 'bundle'}, {out / 'evaluation.json'}, {out / 'evaluation.html'}")


def _is_first_process() -> bool:
    """Under torchrun, the first process does everything but training."""
    return os.environ.get("RANK", "0") == "0"


def _evaluated(
    runs: Iterable[Path], data: Sequence[Path], requests: int, server: str | None
) -> dict[str, Any]:
    """Converts the runs and evaluates the first; results that exist are not computed again."""
    from edge_slm.distill.evaluate import write_html
    from edge_slm_converters import read_checkpoint
    from edge_slm_runtime.files import write_json

    for run in runs:
        if not (run / "bundle").exists():
            checkpoint = read_checkpoint(run / "checkpoint")
            examples = held_out_examples(checkpoint, data)
            convert_with_bar(checkpoint, run / "bundle", None, name=run.name, evaluation=examples)
    out, *others = runs
    stored = out / "evaluation.json"
    if stored.exists():
        result: dict[str, Any] = json.loads(stored.read_text("utf-8"))
        return result
    result = measure(
        out / "bundle",
        data,
        requests=requests,
        baselines={run.name: str(run / "bundle") for run in others},
        server=server,
    )
    (out / "evaluation.html").unlink(missing_ok=True)  # of a run that ended here
    write_html(result, out / "evaluation.html")
    write_json(result, stored)
    return result
