"""`edge-slm profile`: needs of a bundle on this device, and the variant to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from edge_slm.cli.console import emit_json, examples, json_option, progress_bar, stdout_console
from edge_slm.cli.options import Number, bundle_argument, counts, names
from edge_slm_runtime.bundle import Manifest, read_manifest
from edge_slm_runtime.errors import EngineError

if TYPE_CHECKING:
    from rich.table import Table

    from edge_slm_bench.advice import Advice, Limits, VariantRow
    from edge_slm_bench.machine import Machine

_limit = Number(min=0, min_open=True)


@click.command(
    short_help="What fits this device: variant, threads, memory, latency.",
    epilog=examples("profile my-bundle", "profile --max-memory-mb 150 --max-latency-ms 400"),
)
@bundle_argument
@click.option("--variants", type=names, help="Comma-separated.  [default: all]")
@click.option("--threads", type=counts, help="[default: 1, 2, 4 … the cores it may use]")
@click.option(
    "--max-memory-mb", type=_limit, help="Peak resident memory that the device has for it."
)
@click.option("--max-latency-ms", type=_limit, help="Of an answer of 32 words.")
@click.option("--seconds", type=_limit, default=45.0, show_default=True, help="Time for measuring.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    help="Fresh processes per row, as many as the time allows.",
)
@json_option
def profile(
    *,
    bundle: Path,
    variants: tuple[str, ...] | None,
    threads: tuple[int, ...] | None,
    max_memory_mb: float | None,
    max_latency_ms: float | None,
    seconds: float,
    rounds: int,
    as_json: bool,
) -> None:
    """Measure the variants of BUNDLE (by default the one shipped) on this device, and say which
    to choose.

    Every variant answers requests of 16, 32 and 64 words with 1, 2, 4 … threads, in
    fresh processes that take turns; shown are medians. The advice keeps the limits and
    the bundle's fidelity budget. 'bench' measures more, and longer.

    Of variants that were measured from 1 thread to all cores, the best number is remembered on
    this device, and is what loading takes by default; not if the machine was busy before.
    """
    from edge_slm_bench.advice import Limits, advise
    from edge_slm_bench.machine import machine
    from edge_slm_bench.quick import chosen_variants, measure, thread_counts

    manifest, device = read_manifest(bundle), machine()
    chosen = chosen_variants(manifest, variants)
    interrupted = False
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=None)
        try:
            for state in measure(
                str(bundle), manifest, chosen, threads or thread_counts(), seconds, rounds
            ):
                rows, done, total = state
                progress.update(task, completed=done, total=total)
        except KeyboardInterrupt:  # what was measured is shown all the same
            interrupted = True
    limits = Limits(max_memory_mb, max_latency_ms)
    advice = advise(rows, limits)
    remembered = {} if interrupted or _busy(device) else _remember(manifest, rows)
    if as_json:
        emit_json(
            {
                "machine": device.as_dict(),
                "limits": asdict(limits),
                "rows": [row.as_dict() | {"fits": _fits(row, limits)} for row in rows],
                "advice": asdict(advice) | {"chosen": _choice(advice)},
                "remembered": remembered,
            }
        )
    else:
        _print(bundle, rows, limits, advice, device, remembered)
    if interrupted:
        raise KeyboardInterrupt
    if not any(row.measured for row in rows):
        raise EngineError(advice.line, rows[0].reason)


def _fits(row: VariantRow, limits: Limits) -> bool | None:
    return not limits.missed_by(row) if row.measured else None


def _busy(device: Machine) -> bool:
    return device.load is not None and device.load > device.usable_cores / 2


def _remember(manifest: Manifest, rows: Sequence[VariantRow]) -> dict[str, int]:
    """Threads by variant, as they were remembered."""
    from edge_slm_bench.advice import thread_choices
    from edge_slm_runtime.cores import default_threads
    from edge_slm_runtime.thread_choice import remember_threads

    whole = {1, default_threads()}
    by_name, chosen = {variant.name: variant for variant in manifest.variants}, {}
    for name, threads in thread_choices(rows).items():
        if whole <= {row.threads for row in rows if row.variant == name and row.measured}:
            with suppress(OSError):  # a user without a cache
                remember_threads(manifest, by_name[name], threads)
                chosen[name] = threads
    return chosen


def _choice(advice: Advice) -> dict[str, str | int] | None:
    """Arguments for `edge_slm.load`."""
    row = advice.chosen
    if row is None:
        return None
    return {
        "variant": row.variant,
        "engine": row.engine,
        "precision": row.precision,
        "threads": row.threads,
    }


def _print(
    bundle: Path,
    rows: Sequence[VariantRow],
    limits: Limits,
    advice: Advice,
    device: Machine,
    remembered: Mapping[str, int],
) -> None:
    console = stdout_console()
    console.print(_table(rows, limits, advice))
    console.print()
    console.print(advice.line, style="bold", markup=False)
    for remark in advice.remarks:
        console.print(f"  {remark}", markup=False)
    if row := advice.chosen:
        call = f"engine={row.engine!r}, precision={row.precision!r}, threads={row.threads}"
        console.print(f"  edge_slm.load({str(bundle)!r}, {call})", markup=False)
    if remembered:
        told = ", ".join(f"{name} {threads}" for name, threads in remembered.items())
        console.print(f"threads that are now the default here: {told}", markup=False)
    console.print(_conditions(rows, device), style="dim", markup=False)


def _table(rows: Sequence[VariantRow], limits: Limits, advice: Advice) -> Table:
    from rich.table import Table

    words = next((list(row.answers_ms) for row in rows if row.measured), [])
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("variant")
    for heading in (
        "threads",
        "load ms",
        "TTFT ms",
        f"ms for {'/'.join(map(str, words))} words",
        "ms/token",
        "peak MB",
        "disk MB",
        "top-1",
    ):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        figures = ["–"] * 5
        remark = row.reason
        if row.measured:
            figures = [
                f"{median(row.load_ms):.0f}",
                f"{median(row.ttft_ms):.1f}",
                " / ".join(_short(row.latency_ms(n)) for n in words),
                f"{median(row.tpot_ms):.2f}",
                f"{row.memory_mb:.0f}",
            ]
            remark = "; ".join(limits.missed_by(row))
        if row is advice.chosen:
            remark = "← choose"
        table.add_row(
            row.variant,
            str(row.threads),
            *figures,
            f"{row.disk_bytes / 1e6:.1f}",
            _fidelity(row),
            remark,
            style="bold" if row is advice.chosen else "dim" if remark else None,
        )
    return table


def _short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}"


def _fidelity(row: VariantRow) -> str:
    """Top-1 agreement; `!` outside the budget."""
    return "–" if row.top1 is None else f"{row.top1:.1%}{'!' * (row.faithful is False)}"


def _conditions(rows: Sequence[VariantRow], device: Machine) -> str:
    processes = max(len(row.peak_rss_mb) for row in rows)
    busy = f"; the machine was busy before ({device.load} processes ran)" if _busy(device) else ""
    turns = (
        f"medians of {processes} fresh processes in turn" if processes > 1 else "one process each"
    )
    return (
        f"{device.cpu}, {device.usable_cores} cores; {turns}"
        + ("; ! outside the fidelity budget" if any(r.faithful is False for r in rows) else "")
        + busy
    )
