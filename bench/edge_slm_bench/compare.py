"""Two reports against each other: is anything slower, larger or less faithful than before?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from math import isnan, nan
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_slm_bench.comparison import Broken, Change, Comparison, where
from edge_slm_bench.page import Table
from edge_slm_bench.ratios import LEAST_PROCESSES, Processes, ratio_interval
from edge_slm_bench.results import FIGURES, SCENARIOS, Cell, CellResult, Quality, Report, median
from edge_slm_bench.tables import show_table
from edge_slm_runtime.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

# Figure of `Quality` → its part, whether more is better, and what counts as nothing: shares
# of a thousandth, KL that changes no token.
_QUALITY = {
    "top1": ("fidelity", True, 1e-3),
    "kl_mean": ("fidelity", False, 1e-5),
    "within": ("adherence", True, 1e-3),
}
_VERDICTS = {  # worse, better
    "peak_rss_mb": ("more memory", "less memory"),
    "top1": ("less faithful", "more faithful"),
    "kl_mean": ("less faithful", "more faithful"),
    "within": ("less obedient", "more obedient"),
}
_SPEEDS = ("ttft_ms", "tpot_ms", "latency_ms", "tokens_per_second")
_MARKS = {"same": "", "unsure": " ?", "disturbed": " †"}
_LISTED = 12  # of a long list


def compare(before: Report, after: Report, tolerance: float) -> Comparison:
    """Cells are matched by everything that describes them; where no cell matches so, without
    the threads, and a note says it.

    A regression is a figure worse than 1 + `tolerance` whose interval excludes 1 (1 + twice
    the tolerance where there are too few processes for an interval), or a cell that broke.
    Cells that were disturbed in either report are shown and never a regression.

    Peers are the control: their code is the same in both, so a speed that they lost is lost to
    the machine. It is no regression of theirs, and a speed of ours must be worse than theirs
    became by as much as said above.

    Raises DataError when the reports have no cell and no quality in common.
    """
    pairs, notes = _matched(before, after)
    changes: list[Change] = []
    broken = []
    seen = set()
    for a, b in pairs:
        if a.status == "failed" or not a.samples:
            continue
        if b.status == "failed":
            broken.append(Broken(asdict(b.cell), b.reason))
        elif b.samples:
            changes += _cell_changes(a, b, tolerance)
            seen.add(id(b))
        else:
            continue
        seen.add(id(a))
    changes, control = _controlled(changes, before, tolerance)
    notes += control
    worse, unanswered, other = _quality(before, after, tolerance)
    changes += worse
    broken += unanswered
    notes += other
    if not changes and not broken:
        raise DataError(
            "the two reports measured nothing in common",
            "compare runs of the same models, variants and settings",
        )
    lone = [
        tuple(where(asdict(r.cell)) for r in report.cells if r.samples and id(r) not in seen)
        for report in (before, after)
    ]
    speeds = [c.worse for c in changes if c.figure in _SPEEDS and c.verdict != "disturbed"]
    return Comparison(
        before.started,
        after.started,
        tolerance,
        tuple(changes),
        tuple(broken),
        lone[0],
        lone[1],
        median(speeds),
        (*notes, *_notes(before, after, changes)),
    )


def _quality(
    before: Report, after: Report, tolerance: float
) -> tuple[list[Change], list[Broken], list[str]]:
    """Changes of quality, variants that no longer have any, and notes on what was not
    compared."""
    changes: list[Change] = []
    broken: list[Broken] = []
    notes = []
    known = {(q.model, q.variant): q for q in before.quality}
    for q in after.quality:
        old = known.get((q.model, q.variant))
        if old and q.reason and not old.reason:
            broken.append(Broken({"model": q.model, "variant": q.variant}, q.reason))
        elif old and (old.reference, old.evaluation) == (q.reference, q.evaluation):
            changes += _quality_changes(old, q, tolerance)
        elif old:
            notes.append(f"{q.model} {q.variant}: other reference or texts, quality not compared")
    return changes, broken, notes


# -- matching -----------------------------------------------------------------------


def _matched(
    before: Report, after: Report
) -> tuple[list[tuple[CellResult, CellResult]], list[str]]:
    there = {r.cell: r for r in after.cells}
    pairs = [(r, there[r.cell]) for r in before.cells if r.cell in there]
    if any(a.samples for a, _ in pairs) or not before.cells:
        return pairs, []
    # The most threads of the one with the most of the other.
    pairs, notes = [], []
    sides = [_by_rest(report) for report in (before, after)]
    for rest, olds in sides[0].items():
        pairs += zip(olds, sides[1].get(rest, ()), strict=False)
    if pairs:
        a, b = (sorted({r.cell.threads for r in side}) for side in zip(*pairs, strict=True))
        said = " and ".join("/".join(map(str, threads)) for threads in (a, b))
        notes = [f"no cell has the same threads in both: {said} threads are compared"]
    return pairs, notes


def _by_rest(report: Report) -> dict[Cell, list[CellResult]]:
    """Cell without its threads → results, those with the most threads first."""
    results: dict[Cell, list[CellResult]] = {}
    for result in sorted(report.cells, key=lambda r: -r.cell.threads):
        results.setdefault(replace(result.cell, threads=0), []).append(result)
    return results


# -- figures ------------------------------------------------------------------------


def _cell_changes(a: CellResult, b: CellResult, tolerance: float) -> Iterator[Change]:
    for name, figure in FIGURES.items():
        old, new = _per_process(a, name), _per_process(b, name)
        if not old or not new:  # not a figure of this scenario
            continue
        middles = [float(np.median(np.concatenate(side))) for side in (old, new)]
        interval = ratio_interval(old, new)
        change = _change(
            asdict(b.cell),
            name,
            middles,
            middles[1] / middles[0],
            interval,
            figure.higher_is_better,
            (len(old), len(new)),
            tolerance * (1 if interval else 2),
        )
        if "flagged" in (a.status, b.status):
            change = replace(change, verdict="disturbed", regression=False)
        yield change


def _controlled(
    changes: Sequence[Change], before: Report, tolerance: float
) -> tuple[list[Change], list[str]]:
    """Speeds held against what the peers' became, and what that was."""
    names = {(r.cell.model, r.cell.variant) for r in before.cells if r.peer}
    peers = [c for c in changes if (c.cell["model"], c.cell["variant"]) in names]
    theirs = [c.worse for c in peers if c.figure in _SPEEDS and c.verdict != "disturbed"]
    if not theirs:
        return list(changes), []
    machine = max(1.0, median(theirs) or 1.0)

    def held(change: Change) -> Change:
        if change.regression and change.figure in (*_SPEEDS, "load_ms"):
            higher, ends = FIGURES[change.figure].higher_is_better, (change.low, change.high)
            end = ends[1] if higher else ends[0]
            least = change.worse if end is None else (1 / end if higher else end)
            sure = least > machine and change.worse > machine * (1 + tolerance)
            if change in peers or not sure:
                return replace(change, verdict="unsure", regression=False)
        return change

    note = f"the peers, whose code is the same, took {median(theirs):.2f}× the time of before"
    return [held(change) for change in changes], [note]


def _per_process(result: CellResult, name: str) -> Processes:
    values = (replace(result, samples=(sample,)).values(name) for sample in result.used)
    return [v for v in values if v]


def _quality_changes(old: Quality, new: Quality, tolerance: float) -> Iterator[Change]:
    """The figures are exact for their texts, so there is no interval."""
    cell = {"model": new.model, "variant": new.variant}
    for name, (part, higher, least) in _QUALITY.items():
        a, b = ((getattr(side, part) or {}).get(name, nan) for side in (old, new))
        if not isnan(a + b):
            ratio = max(b, least) / max(a, least)
            yield _change(cell, name, (a, b), ratio, None, higher, (0, 0), tolerance)


def _change(
    cell: Mapping[str, Any],
    name: str,
    middles: Sequence[float],
    ratio: float,
    interval: tuple[float, float] | None,
    higher_is_better: bool,
    processes: tuple[int, int],
    tolerance: float,
) -> Change:
    worse = 1 / ratio if higher_is_better else ratio
    low, high = interval or (None, None)
    bad, good = _VERDICTS.get(name, ("slower", "faster"))
    if 1 / (1 + tolerance) <= worse <= 1 + tolerance:
        verdict = "same"
    elif interval and interval[0] <= 1 <= interval[1]:
        verdict = "unsure"
    else:
        verdict = bad if worse > 1 else good
    return Change(
        cell,
        name,
        middles[0],
        middles[1],
        ratio,
        low,
        high,
        worse,
        processes,
        verdict,
        verdict == bad,
    )


def _notes(before: Report, after: Report, changes: list[Change]) -> Iterator[str]:
    for name in before.models.keys() & after.models.keys():
        if before.models[name].get("digest") != after.models[name].get("digest"):
            yield f"{name}: another bundle than before, its digest changed"
    for fact in ("cpu", "cores", "usable_cores", "system", "python"):
        a, b = before.machine.get(fact), after.machine.get(fact)
        if a != b:
            yield f"another machine: {fact.replace('_', ' ')} {a} → {b}"
    old, new = (report.machine.get("packages", {}) for report in (before, after))
    for package in sorted({*old, *new}):
        if old.get(package) != new.get(package):
            yield f"{package} {old.get(package, 'none')} → {new.get(package, 'none')}"
    measured = [c for c in changes if any(c.processes)]
    if few := [c for c in measured if c.low is None]:
        yield (
            f"{len(few)} of {len(measured)} figures have fewer than {LEAST_PROCESSES} processes "
            "on a side and so no interval: twice the tolerance holds for them"
        )
    if measured and all(c.verdict == "disturbed" for c in measured):
        yield "every cell was disturbed: no speed was held against the tolerance"


# -- on the terminal ----------------------------------------------------------------


def show(comparison: Comparison, console: Console) -> None:
    """Ratios per cell, what only one report has, notes, and the regressions last."""
    from rich.text import Text

    for table in _tables(comparison):
        show_table(table, console)
    for name, cells in (("before", comparison.only_before), ("after", comparison.only_after)):
        if cells:
            more = f"; {len(cells) - _LISTED} more" * (len(cells) > _LISTED)
            console.print(Text(f"measured only {name}: {'; '.join(cells[:_LISTED])}{more}"))
    for note in comparison.notes:
        console.print(Text(note))
    if comparison.drift is not None:
        console.print(Text(drift(comparison)))
    regressions = comparison.regressions
    console.print(
        Text(
            f"{len(regressions) or 'no'} regression{'s' * (len(regressions) != 1)} "
            f"beyond {comparison.tolerance:.0%}",
            "bold red" if regressions else "bold green",
        )
    )
    for regression in regressions[:_LISTED]:
        console.print(Text(regression.line))
    if len(regressions) > _LISTED:
        console.print(Text(f"{len(regressions) - _LISTED} more, marked ✗ above"))


def drift(comparison: Comparison) -> str:
    """Whether everything moved alike."""
    middle = comparison.drift or 1.0
    line = f"median over all speeds: {middle:.2f}× the time of before"
    moved = [c for c in comparison.changes if c.figure in _SPEEDS and c.verdict != "disturbed"]
    alike = sum((c.worse > 1) == (middle > 1) for c in moved)
    if abs(middle - 1) > comparison.tolerance / 2 and alike > 0.9 * len(moved):
        line += ": the machine, its load or the settings may have changed, not the code"
    return line


def _tables(comparison: Comparison) -> Iterator[Table]:
    rows: dict[tuple[str, str], dict[str, dict[str, Change]]] = {}
    for change in comparison.changes:
        kind = (change.cell["model"], change.cell.get("scenario", "quality"))
        row = where(change.cell).removeprefix(f"{kind[0]} ")
        rows.setdefault(kind, {}).setdefault(row, {})[change.figure] = change
    for kind in sorted(rows, key=lambda k: (*SCENARIOS, "quality").index(k[1])):
        names = [n for n in (*FIGURES, *_QUALITY) if any(n in row for row in rows[kind].values())]
        yield Table(
            ["cell", *(FIGURES[n].label if n in FIGURES else n for n in names)],
            [[name, *(_cell(row.get(n)) for n in names)] for name, row in rows[kind].items()],
            f"{kind[0]}, {kind[1]}: after ÷ before [95%]",
            ["✗ regression, ✓ better, ? beyond the tolerance but uncertain, † disturbed"],
        )


def _cell(change: Change | None) -> str:
    if change is None:
        return "–"
    interval = "" if change.low is None else f" [{change.low:.2f}, {change.high:.2f}]"
    mark = _MARKS.get(change.verdict, " ✗" if change.regression else " ✓")
    return f"{'*' * change.regression}{change.ratio:.2f}{interval}{mark}"
