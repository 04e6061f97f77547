"""The rows and columns of a speed table: which cells share a row, and what is shown of them.

A table holds one scenario of one model, a row one variant at one number of threads. Prompt
lengths (and batch sizes, offline) stand side by side; whatever is the same in every row is
said once, above. Notes below give the reasons of what failed or was disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from edge_slm_bench.notes import DISTURBED, PEER, notes
from edge_slm_bench.page import Table
from edge_slm_bench.results import Cell, CellResult, Figures, Report, Scenario, median

_TITLES = {
    "single-stream": "one request at a time",
    "variations": "one request under two commands in turn",
    "offline": "batches, tokens/s",
    "server": "requests at random times",
}
# What sets one row of a scenario apart from the next, and how it is said above the table.
_KEYS: dict[Scenario, tuple[tuple[str, str], ...]] = {
    "single-stream": (("new_tokens", "new tokens"),),
    "variations": (("new_tokens", "new tokens"),),
    "offline": (("prompt_tokens", "prompt tokens"), ("new_tokens", "new tokens")),
    "server": (
        ("prompt_tokens", "prompt tokens"),
        ("new_tokens", "new tokens"),
        ("concurrency", "workers"),
        ("rate", "requests/s"),
    ),
}


Value = tuple[float | None, bool]  # a figure, and whether its processes were disturbed


@dataclass(frozen=True, slots=True)
class TableRow:
    """Cells of the sweep that share a row, with their figures; shortest prompt and smallest
    batch first."""

    cells: tuple[tuple[CellResult, Figures], ...]

    @property
    def cell(self) -> Cell:
        return self.cells[0][0].cell

    @property
    def measured(self) -> list[tuple[CellResult, Figures]]:
        return [(result, figures) for result, figures in self.cells if result.samples]

    def at(self, name: str, axis: str, place: int) -> Value:
        """The figure of the cell whose `axis` is `place`."""
        cells = [pair for pair in self.measured if getattr(pair[0].cell, axis) == place]
        return _value(cells[0], name) if cells else (None, False)

    def first(self, name: str) -> Value:
        return _value(self.measured[0], name) if self.measured else (None, False)

    def last(self, name: str) -> Value:
        return _value(self.measured[-1], name) if self.measured else (None, False)

    def over(self, name: str, combine: Callable[[Sequence[float]], float | None]) -> Value:
        """Of all cells; of the undisturbed ones alone where there are some."""
        values = [_value(pair, name) for pair in self.measured]
        fair = [v for v, disturbed in values if v is not None and not disturbed]
        known = fair or [v for v, _ in values if v is not None]
        return combine(known) if known else None, not fair


def _value(measured: tuple[CellResult, Figures], name: str) -> Value:
    result, figures = measured
    return getattr(figures, name), result.status == "flagged"


@dataclass(frozen=True, slots=True)
class Column:
    """better: +1 where more is better, -1 where less is, 0 where neither."""

    head: str
    value: Callable[[TableRow], Value]
    better: int = -1
    missing: str = "–"


def speed_tables(report: Report, scenario: Scenario) -> list[Table]:
    """One per model that has cells of the scenario."""
    models = dict.fromkeys(r.cell.model for r in report.cells if r.cell.scenario == scenario)
    return [_speed_table(report, model, scenario) for model in models]


def rows_of(report: Report, model: str, scenario: Scenario) -> list[TableRow]:
    """Ours first, then the peers, each in the order of the sweep."""
    groups: dict[Any, list[tuple[CellResult, Figures]]] = {}
    for result in report.cells:
        cell = result.cell
        if (cell.model, cell.scenario) == (model, scenario):
            key = tuple(getattr(cell, name) for name, _ in _KEYS[scenario])
            group = groups.setdefault((cell.variant, cell.threads, *key), [])
            group.append((result, report.figures(result)))
    for group in groups.values():
        group.sort(key=lambda pair: (pair[0].cell.prompt_tokens, pair[0].cell.batch))
    order = list(dict.fromkeys((g[0][0].peer, g[0][0].cell.variant) for g in groups.values()))
    order.sort(key=lambda name: name[0])
    rows = [TableRow(tuple(group)) for group in groups.values()]
    return sorted(rows, key=lambda r: order.index((r.cells[0][0].peer, r.cell.variant)))


def _speed_table(report: Report, model: str, scenario: Scenario) -> Table:
    rows = rows_of(report, model, scenario)
    results = [result for row in rows for result, _ in row.cells]
    same, differing = [], []
    for name, label in _KEYS[scenario]:
        values = dict.fromkeys(getattr(row.cell, name) for row in rows)
        if len(values) == 1:
            same.append(f"{next(iter(values)):g} {label}")
        else:
            differing.append((name, label))
    columns = [
        column
        for column in _columns(scenario, results, report)
        if any(column.value(row)[0] is not None for row in rows if row.measured)
    ]
    shown = [_figures(column, rows) for column in columns]
    table = []
    for i, row in enumerate(rows):
        result = row.cells[0][0]
        figures = [column[i] for column in shown]
        if not row.measured and figures:
            figures[0] = result.status
        table.append(
            [
                result.cell.variant + f" {PEER}" * result.peer,
                str(result.cell.threads),
                *(f"{getattr(row.cell, name):g}" for name, _ in differing),
                *figures,
            ]
        )
    heads = ["variant", "threads", *(label for _, label in differing)]
    return Table(
        [*heads, *(column.head for column in columns)],
        table,
        f"{model}, {_TITLES[scenario]}: {', '.join(same)}".removesuffix(": "),
        notes(results),
        len(heads),
    )


def _columns(scenario: Scenario, results: Sequence[CellResult], report: Report) -> Iterable[Column]:
    if scenario == "single-stream":
        yield Column("load ms cold", lambda row: row.over("load_cold_ms", median))
        yield Column("load ms warm", lambda row: row.over("load_ms", median))
        for n in sorted({r.cell.prompt_tokens for r in results if r.samples}):
            yield Column(f"TTFT ms {n}", _at("ttft_ms", "prompt_tokens", n))
        yield Column("TPOT ms p50", lambda row: row.first("tpot_ms"))
        yield Column("p90", lambda row: row.first("tpot_p90_ms"))
        yield Column("p99", lambda row: row.first("tpot_p99_ms"))
        yield Column("pp tok/s", lambda row: row.last("pp_per_second"), 1)
        yield Column("tg tok/s", lambda row: row.first("tg_per_second"), 1)
        yield Column("× floor", lambda row: row.first("floor_ratio"))
        yield Column("× floor best", lambda row: row.first("best_floor_ratio"))
    elif scenario == "variations":
        for n in sorted({r.cell.prompt_tokens for r in results if r.samples}):
            yield Column(f"TTFT ms {n}", _at("ttft_ms", "prompt_tokens", n))
        yield Column("TPOT ms p50", lambda row: row.first("tpot_ms"))
        yield Column("tok/s", lambda row: row.first("tokens_per_second"), 1)
    elif scenario == "offline":
        for n in sorted({r.cell.batch for r in results if r.samples}):
            yield Column(f"batch {n}", _at("tokens_per_second", "batch", n), 1)
    else:
        yield Column("latency ms p50", lambda row: row.first("latency_p50_ms"))
        yield Column("p90", lambda row: row.first("latency_p90_ms"))
        yield Column("p99", lambda row: row.first("latency_p99_ms"))
        target = f"{report.settings.get('target_ms') or 0:g}"
        yield Column(f"within {target} ms, requests/s", lambda row: row.first("goodput"), 1)
        yield Column("tok/s", lambda row: row.first("tokens_per_second"), 0)
    yield Column("peak RSS MB", lambda row: row.over("peak_rss_mb", max))
    if scenario == "single-stream":
        yield Column("disk MB", lambda row: (row.cells[0][0].disk_bytes / 1e6 or None, False))
    yield Column("mJ/ token", _millijoules, missing="unavailable")


def _at(name: str, axis: str, place: int) -> Callable[[TableRow], Value]:
    return lambda row: row.at(name, axis, place)


def _millijoules(row: TableRow) -> Value:
    joules, disturbed = row.first("joules_per_token")
    return None if joules is None else joules * 1e3, disturbed


def _figures(column: Column, rows: Sequence[TableRow]) -> list[str]:
    """A column's cells. The best undisturbed value of the rows under the same load is
    marked, where they differ at all."""
    values = [column.value(row) if row.measured else (None, False) for row in rows]
    loads = [tuple(getattr(row.cell, key) for key, _ in _KEYS[row.cell.scenario]) for row in rows]
    best: dict[Any, str] = {}
    for load in set(loads):
        fair = [
            value * column.better
            for (value, disturbed), own in zip(values, loads, strict=True)
            if own == load and value is not None and not disturbed
        ]
        if column.better and len({number(v) for v in fair}) > 1:
            best[load] = number(max(fair) * column.better)
    shown = []
    for row, load, (value, disturbed) in zip(rows, loads, values, strict=True):
        text = column.missing if value is None and row.measured else number(value)
        if disturbed and value is not None:
            text += DISTURBED
        shown.append(f"*{text}" if text == best.get(load) else text)
    return shown


def number(value: float | None) -> str:
    """Three figures or so, without an exponent; "–" where there is none."""
    if value is None or isnan(value):
        return "–"
    size = abs(value)
    digits = 0 if size >= 99.5 else 1 if size >= 9.95 else 2 if size >= 0.095 or not size else 5
    return f"{value:.{digits}f}"
