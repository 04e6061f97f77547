"""A report as tables for people, on the terminal and in Markdown, and as CSV for programs."""

from __future__ import annotations

import csv as csv_format
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from edge_slm_bench.notes import PEER, machine_line
from edge_slm_bench.page import Table
from edge_slm_bench.results import SCENARIOS, Cell, Endurance, Figures, Quality, Report
from edge_slm_bench.rows import number, speed_tables

if TYPE_CHECKING:
    from rich.console import Console


def tables(report: Report) -> list[Table]:
    """Every table of the report, in reading order."""
    speeds = [t for scenario in SCENARIOS for t in speed_tables(report, scenario)]
    return [*speeds, *quality_tables(report), *endurance_tables(report)]


# -- quality, endurance ---------------------------------------------------------


def quality_tables(report: Report) -> list[Table]:
    """One per model."""
    tables = []
    for model in dict.fromkeys(q.model for q in report.quality):
        mine = [q for q in report.quality if q.model == model]
        mine.sort(key=lambda q: q.peer)
        reasons = [f"{q.variant}: {q.reason}" for q in mine if q.reason]
        peers = [f"{PEER} another engine, same weights"] if any(q.peer for q in mine) else []
        head = ["variant", "top-1 agreement", "perplexity ratio", "mean KL", "99.9% KL"]
        adherence = any(q.adherence for q in mine)
        if adherence:
            head += ["words within tolerance", "mean abs. error", "Spearman (words)"]
        rows = [_quality_row(q, adherence) for q in mine]
        about = f"{model}, fidelity to {mine[0].reference or 'nothing'}; {mine[0].evaluation}"
        tables.append(Table(head, rows, about, [*peers, *reasons]))
        if compared := [q for q in mine if q.differing is not None]:
            tables.append(_differing_table(model, compared))
    return tables


def _differing_table(model: str, compared: Sequence[Quality]) -> Table:
    ways = list(dict.fromkeys(way for q in compared for way in q.differing or ()))
    rows = [
        [q.variant, str(len(q.words)), *(str((q.differing or {}).get(way, "–")) for way in ways)]
        for q in compared
    ]
    about = f"{model}, greedy answers that differ from those one by one, nothing cached"
    return Table(["variant", "answers", *ways], rows, about, [])


def _quality_row(quality: Quality, adherence: bool) -> list[str]:
    row = [quality.variant + f" {PEER}" * quality.peer]
    if fidelity := quality.fidelity:
        row += [
            f"{fidelity['top1']:.2%}",
            f"{fidelity['perplexity_ratio']:.4f}",
            _small(fidelity["kl_mean"]),
            _small(fidelity["kl_999"]),
        ]
    else:
        row += ["reference" if quality.variant == quality.reference else "–", *["–"] * 3]
    if obeyed := quality.adherence:
        row += [f"{obeyed['within']:.1%}", number(obeyed["mae"]), number(obeyed.get("spearman"))]
    return row + ["–"] * (5 + 3 * adherence - len(row))


def _small(value: float) -> str:
    return f"{value:.1e}" if abs(value) < 1e-5 else f"{value:.5f}"


def endurance_tables(report: Report) -> list[Table]:
    """One per model."""
    models = dict.fromkeys(e.model for e in report.endurance)
    return [
        _endurance_table(model, [e for e in report.endurance if e.model == model])
        for model in models
    ]


def _endurance_table(model: str, runs: Sequence[Endurance]) -> Table:
    rows = []
    notes = ["growth: from a tenth of the requests on, when every buffer exists"]
    for e in runs:
        ends = [e.rss_mb[0][1], e.rss_mb[-1][1]] if e.rss_mb else [None, None]
        growth = "–" if e.growth_mb is None else f"{e.growth_mb:+.1f}"
        rows.append([e.variant, str(e.requests), *map(number, ends), growth])
        if e.reason:
            notes.append(f"{e.variant}: {e.reason}")
    head = ["variant", "requests", "first MB", "last MB", "growth MB"]
    return Table(head, rows, f"{model}, resident memory of one process", notes)


# -- ways to show them ----------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Every table; one that is wider than the console continues in another below."""
    from rich.text import Text

    for table in tables(report):
        show_table(table, console)
    console.print(Text(machine_line(report)), soft_wrap=not console.is_terminal)


def show_table(table: Table, console: Console) -> None:
    from rich import table as rich
    from rich.text import Text

    console.print(Text(table.caption, style="bold"))
    widths = [
        max(*map(len, head.split()), *(len(row[i].removeprefix("*")) for row in table.rows), 1)
        for i, head in enumerate(table.head)
    ]
    for part in _parts(widths, table.names, console.width):
        shown = rich.Table(box=None, header_style="bold", pad_edge=False)
        for i in part:
            justify: Any = "right" if widths[i] and _numeric(table, i) else "left"
            shown.add_column(Text(table.head[i], justify=justify), width=widths[i], justify=justify)
        for row in table.rows:
            strong = row[0].startswith("*")
            shown.add_row(
                *(
                    Text(row[i].removeprefix("*"), "bold" if strong or row[i][:1] == "*" else "")
                    for i in part
                )
            )
        console.print(shown)
    for note in table.notes:
        console.print(Text(note, style="dim"))
    console.print()


def _numeric(table: Table, column: int) -> bool:
    return column > 0 and any(row[column].lstrip("*+-–")[:1].isdigit() for row in table.rows)


def _parts(widths: Sequence[int], names: int, width: int) -> list[list[int]]:
    """Columns that fit beside each other (two spaces between them), names in each part."""
    gap, start = 2, sum(widths[:names]) + 2 * (names - 1)
    parts, used = [list(range(names))], start
    for i in range(names, len(widths)):
        if used + gap + widths[i] > width and len(parts[-1]) > names:
            parts.append(list(range(names)))
            used = start
        parts[-1].append(i)
        used += gap + widths[i]
    return parts


def markdown(report: Report) -> str:
    """Tables of GitHub's Markdown, ready for a README."""
    parts = [_markdown_table(table) for table in tables(report)]
    return "\n\n".join([*parts, _escaped(machine_line(report))]) + "\n"


def _markdown_table(table: Table) -> str:
    right = ["--:" if _numeric(table, i) else "---" for i in range(len(table.head))]
    lines = [
        f"**{_escaped(table.caption)}**\n",
        f"| {' | '.join(map(_escaped, table.head))} |",
        f"|{'|'.join(right)}|",
        *(f"| {' | '.join(map(_marked, row))} |" for row in table.rows),
    ]
    return "\n".join(lines + [""] * bool(table.notes) + [f"- {_escaped(n)}" for n in table.notes])


def _marked(cell: str) -> str:
    return f"**{_escaped(cell[1:])}**" if cell.startswith("*") else _escaped(cell)


def _escaped(text: str) -> str:
    for special in "\\|*`<":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def csv(report: Report) -> str:
    """One line per cell (RFC 4180), every figure under its name in `results`; empty where
    there is none. Quality and endurance of the variant stand on each of its lines."""
    quality = {(q.model, q.variant): q for q in report.quality}
    endurance = {(e.model, e.variant): e for e in report.endurance}
    parts = ("fidelity", "adherence")
    extra = {
        part: sorted({name for q in report.quality for name in getattr(q, part) or ()})
        for part in parts
    }
    facts = ("engine", "precision", "peer", "disk_bytes", "step_bytes", "status", "reason")
    out = io.StringIO()
    writer = csv_format.writer(out, lineterminator="\r\n")
    writer.writerow(
        [
            *(f.name for f in fields(Cell)),
            *facts,
            *(f.name for f in fields(Figures)),
            *(f"{part}_{name}" for part in parts for name in extra[part]),
            "endurance_requests",
            "endurance_growth_mb",
        ]
    )
    for result in report.cells:
        key = (result.cell.model, result.cell.variant)
        lasted = endurance.get(key)
        writer.writerow(
            [
                *asdict(result.cell).values(),
                *(getattr(result, name) for name in facts),
                *report.figures(result).as_dict().values(),
                *(
                    (getattr(quality.get(key), part, None) or {}).get(name)
                    for part in parts
                    for name in extra[part]
                ),
                *((lasted.requests, lasted.growth_mb) if lasted else (None, None)),
            ]
        )
    return out.getvalue()
