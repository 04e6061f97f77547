"""`edge-slm bench`: speed, memory, energy, fidelity and adherence of bundles, and of peers."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edge_slm
from edge_slm.cli.console import (
    emit_json,
    examples,
    json_option,
    note,
    progress_bar,
    reporter,
    stdout_console,
)
from edge_slm.cli.options import Number, Numbers, bundle_type, counts, folder, names
from edge_slm_runtime.errors import BenchRegression, CheckpointError, VariantNotFound

if TYPE_CHECKING:
    from edge_slm_bench.metrics.examples import Example
    from edge_slm_bench.results import Report
    from edge_slm_bench.sweep import Model, Settings


@click.command(
    short_help="Measure bundles: speed, memory, energy, fidelity, adherence.",
    epilog=examples(
        "bench my-bundle --threads 1,2 --out report",
        "bench my-bundle --peers models/reference --scenario offline --batch 8,32",
        "bench --compare before/report.json after/report.json",
    ),
)
@click.argument("bundles", nargs=-1, type=bundle_type)
@click.option("--variants", type=names, help="Comma-separated.  [default: all]")
@click.option(
    "--peers",
    type=folder,
    multiple=True,
    metavar="CHECKPOINT",
    help="Measure other engines too, on the weights that a bundle was made from; repeatable.",
)
@click.option("--speculate", is_flag=True, help="Measure numba variants with guessed tokens too.")
@click.option(
    "--peer-variants", type=names, help="Of the peers, comma-separated.  [default: all installed]"
)
@click.option("--threads", type=counts, help="[default: the cores this process may use]")
@click.option("--prompt-tokens", type=counts, default="16,64,256", show_default=True)
@click.option("--new-tokens", type=counts, default="48", show_default=True)
@click.option(
    "--scenario",
    "scenarios",
    type=click.Choice(["single-stream", "variations", "offline", "server"]),
    multiple=True,
    default=["single-stream"],
    show_default=True,
    help="Repeatable.",
)
@click.option("--batch", type=counts, default="8", show_default=True, help="Rows (offline).")
@click.option(
    "--concurrency", type=counts, default="1", show_default=True, help="Workers (server)."
)
@click.option(
    "--rate",
    type=Numbers(float, 0.001),
    default="4",
    show_default=True,
    help="Requests/s (server).",
)
@click.option(
    "--target-ms",
    type=Number(min=0, min_open=True),
    default=500.0,
    show_default=True,
    help="Latency that counts as good (server).",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Fresh processes per cell, taken in turn.",
)
@click.option(
    "--repetitions",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Timed requests per process, after a warm-up.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Samples as in training: fidelity and adherence on their held-out pairs.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=2),
    default=60,
    show_default=True,
    help="Held-out pairs of --data to use.",
)
@click.option(
    "--endurance",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Requests to one process, to see its memory grow; 1000 show it.",
)
@click.option("--max-memory-mb", type=Number(min=1), help="Kill a process above it.")
@click.option("--out", type=folder, help="Folder for report.json, .md, .csv, .html and samples.")
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A.json B.json",
    help="Measure nothing: compare two reports; exit 11 on a regression.",
)
@click.option(
    "--tolerance",
    type=Number(min=0),
    default=0.1,
    show_default=True,
    help="Change that --compare lets pass, as a share.",
)
@json_option
def bench(
    *,
    bundles: tuple[Path, ...],
    compare: tuple[Path, Path] | None,
    tolerance: float,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Measure every cell of a sweep over BUNDLES in fresh processes that take turns:
    variants × threads × scenario × prompt length × answer length × batch or concurrency.
    Without BUNDLES the one shipped is measured.

    Every sample is kept; what disturbed the machine is flagged. Ctrl-C reports what
    was measured until then. With --compare, two reports side by side instead.
    """
    if compare:
        _compare(*compare, tolerance, as_json)
        return
    report = _measure(bundles or (edge_slm.shipped_bundle(),), options, out)
    if out:
        _write(report, out)
    if as_json:
        emit_json(report.as_dict())
    else:
        from edge_slm_bench.tables import show

        show(report, stdout_console())
    if out:
        note(f"{out / 'report.html'}, {out / 'report.json'}")
    if report.interrupted:
        raise KeyboardInterrupt


def _measure(bundles: Sequence[Path], options: dict[str, Any], out: Path | None) -> Report:
    from edge_slm_bench.bench import run_bench
    from edge_slm_bench.html import check_needs
    from edge_slm_runtime.files import refuse_existing

    if out:
        refuse_existing(out)
        check_needs()
    with tempfile.TemporaryDirectory(prefix="edge-slm-peers-") as scratch:
        models = _models(bundles, options, Path(scratch))
        examples = {model.name: _examples(model, options) for model in models}
        if out:
            out.mkdir(parents=True)
        with reporter() as report:
            return run_bench(
                models,
                _settings(options),
                command=shlex.join(["edge-slm", *sys.argv[1:]]),
                examples=examples,
                endurance_requests=options["endurance"],
                journal=out / "samples.jsonl" if out else None,
                report=lambda done, total, what: report("measure", done, total, what),
            )


def _settings(options: dict[str, Any]) -> Settings:
    from edge_slm_bench.sweep import Settings
    from edge_slm_runtime.cores import default_threads

    return Settings(
        threads=options["threads"] or (default_threads(),),
        prompt_tokens=options["prompt_tokens"],
        new_tokens=options["new_tokens"],
        scenarios=options["scenarios"],
        batches=options["batch"],
        concurrencies=options["concurrency"],
        rates=options["rate"],
        repetitions=options["repetitions"],
        rounds=options["rounds"],
        target_ms=options["target_ms"],
        memory_limit_mb=options["max_memory_mb"],
    )


def _models(bundles: Sequence[Path], options: dict[str, Any], scratch: Path) -> list[Model]:
    """The models of the sweep. Raises BundleError, VariantNotFound for a name that no bundle
    has, and CheckpointError when a checkpoint belongs to none of the bundles."""
    from dataclasses import replace

    from edge_slm_bench.sweep import model_of

    variants = options["variants"]
    labels = [path.name for path in bundles]
    models = [
        model_of(
            path,
            variants,
            name=path.name if labels.count(path.name) == 1 else str(path),
            speculate=options["speculate"],
        )
        for path in bundles
    ]
    if unknown := [n for n in variants or () if all(n in model.missing for model in models)]:
        there = dict.fromkeys(v.name for model in models for v in model.manifest.variants)
        raise VariantNotFound(
            f"no bundle has a variant {unknown[0]!r}", f"known: {', '.join(there)}"
        )
    for number, checkpoint in enumerate(options["peers"]):
        place = _made_from(checkpoint, models)
        specs, missing = _prepared(
            checkpoint,
            scratch / str(number),
            options["peer_variants"],
            models[place].manifest.model.positions,
        )
        models[place] = replace(
            models[place],
            specs=(*models[place].specs, *specs),
            missing={**models[place].missing, **missing},
        )
    return models


def _made_from(checkpoint: Path, models: Sequence[Model]) -> int:
    """Index of the model whose manifest has the digest of the checkpoint: peers must run the
    same weights."""
    from edge_slm_converters.checkpoint import read_checkpoint

    digests = read_checkpoint(checkpoint).digests()
    for place, model in enumerate(models):
        if model.manifest.provenance.get("checkpoint") == digests:
            return place
    raise CheckpointError(
        f"none of the bundles was made from {checkpoint}",
        "peers are measured on the same weights: convert it first",
    )


def _prepared(checkpoint: Path, scratch: Path, names: Sequence[str] | None, context: int) -> Any:
    from edge_slm_converters.peers import PEERS, prepare

    chosen = names or list(PEERS)
    if unknown := [name for name in chosen if name not in PEERS]:
        raise click.BadParameter(f"no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    with progress_bar() as progress:
        task = progress.add_task("preparing peers", total=len(chosen))

        def step(name: str) -> None:
            progress.update(task, description=f"preparing {name}")
            progress.advance(task)

        return prepare(checkpoint, scratch, chosen, step, context)


def _examples(model: Model, options: dict[str, Any]) -> list[Example]:
    """Pairs of --data that the recipe of the bundle holds out; for an untrained model, those
    that a default recipe does."""
    from edge_slm.cli.convert import held_out

    if not options["data"]:
        return []
    recipe = model.manifest.provenance.get("recipe")
    return held_out(options["data"], model.manifest.prompt, recipe, options["examples"])


def _write(report: Report, out: Path) -> None:
    from edge_slm_bench.html import write_html
    from edge_slm_bench.tables import csv, markdown
    from edge_slm_runtime.files import write_json, write_text

    write_json(report.as_dict(), out / "report.json")
    write_text(markdown(report), out / "report.md")
    write_text(csv(report), out / "report.csv")
    write_html(report, out / "report.html")


def _compare(before: Path, after: Path, tolerance: float, as_json: bool) -> None:
    """Raises BenchRegression."""
    from edge_slm_bench.compare import compare, show
    from edge_slm_bench.results import Report

    comparison = compare(Report.read(before), Report.read(after), tolerance)
    if as_json:
        emit_json(comparison.as_dict())
    else:
        show(comparison, stdout_console())
    if comparison.regressions:
        raise BenchRegression(
            f"{len(comparison.regressions)} figures are worse by more than {tolerance:.0%}"
        )
