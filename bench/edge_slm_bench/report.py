"""Measurements as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_slm_bench.measure import Measurement

if TYPE_CHECKING:
    from rich.table import Table


def speed_table(cells: Sequence[Measurement]) -> Table:
    """One row per cell, medians; with the words asked and got where texts were generated."""
    from rich.table import Table

    lengths = sorted({n for cell in cells for n in cell.ttft_ms})
    bundles = len({cell.bundle for cell in cells}) > 1
    table = Table(box=None, header_style="bold", pad_edge=False)
    if bundles:
        table.add_column("bundle")
    table.add_column("variant")
    if answered := any(cell.generations for cell in cells):
        table.add_column("words asked→got")
    for heading in (
        "threads",
        "load ms",
        f"TTFT ms at {'/'.join(map(str, lengths))} tokens",
        "ms/token",
        "tokens/s",
        "peak RSS MB",
        "disk MB",
    ):
        table.add_column(heading, justify="right")
    for cell in cells:
        figures = cell.medians()
        ttft = (figures["ttft_ms"].get(n) for n in lengths)
        table.add_row(
            *([Path(cell.bundle).name] if bundles else []),
            cell.variant,
            *([_words(cell)] if answered else []),
            str(cell.threads),
            f"{figures['load_ms']:.0f}",
            " / ".join("–" if ms is None else f"{ms:.1f}" for ms in ttft),
            f"{figures['tpot_ms']:.2f}",
            f"{figures['tokens_per_second']:.0f}",
            f"{figures['peak_rss_mb']:.0f}",
            f"{cell.disk_bytes / 1e6:.1f}",
        )
    return table


def _words(cell: Measurement) -> str:
    return " ".join(f"{g['asked']['words']}→{g['words']}" for g in cell.generations)
