"""A report as one self-contained HTML page: headlines, plots, tables, machine, definitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_slm_bench.notes import DEFINITIONS, DISTURBED, bandwidth, energy
from edge_slm_bench.page import Figure, Section, Tile, render_page
from edge_slm_bench.plots import scatter
from edge_slm_bench.plots_speed import Line, Point, Spread, bars, lines, pareto, spreads
from edge_slm_bench.results import CellResult, Report, Scenario
from edge_slm_bench.rows import number, speed_tables
from edge_slm_bench.tables import endurance_tables, quality_tables
from edge_slm_runtime.errors import DependencyMissing
from edge_slm_runtime.files import write_text
from edge_slm_runtime.length import tolerance

# What a variant has to agree in with the reference to be named as the one to choose.
TOP1_TO_CHOOSE = 0.95
SPREAD = "Dot: median; bar: the middle half; line: 1% to 99%; speck: the slowest."
STEPS = "Every token after the first; a request's mean where its engine reports no more."
FLOOR = "Decode time ÷ the time to read the weights once, just before; dashed: the floor."


def check_needs() -> None:
    """Raises DependencyMissing, which `write_html` would after all was measured."""
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise DependencyMissing(
                f"an HTML report needs {package}", "pip install 'edge-slm[bench]'"
            )


def write_html(report: Report, path: str | Path) -> None:
    """Written aside, flushed and renamed. Raises DependencyMissing."""
    write_text(render(report), Path(path))


def render(report: Report) -> str:
    """The page as text. Raises DependencyMissing."""
    several = report.models if len(report.models) > 1 else ()
    sections = (
        *(Section(model, tiles=list(_headlines(report, model))) for model in several),
        _choice(report),
        _single_stream(report),
        _variations(report),
        _offline(report),
        _server(report),
        _quality(report),
        _endurance(report),
        _machine(report),
        _settings(report),
        _definitions(report),
    )
    kept = [s for s in sections if s.tiles or s.figures or s.tables or s.facts or s.code]
    tiles = _headlines(report, next(iter(report.models), "")) if len(report.models) < 2 else ()
    return render_page(
        f"Measured: {', '.join(report.models)}", _subtitle(report), list(tiles), kept
    )


def _subtitle(report: Report) -> str:
    m = report.machine
    when = report.started.replace("T", " ").replace("+00:00", " UTC")
    cores = f"{m.get('usable_cores', '?')} of {m.get('cores', '?')} cores"
    states = Counter(r.status for r in report.cells)
    said = {"ok": "measured", "flagged": "disturbed"}
    counts = ", ".join(f"{n} {said.get(status, status)}" for status, n in states.items())
    ended = " Interrupted: not every cell was measured." if report.interrupted else ""
    return f"{when}, {m.get('cpu', 'unknown CPU')}, {cores}. Cells: {counts}.{ended}"


# -- headlines --------------------------------------------------------------------


def _headlines(report: Report, model: str) -> Iterable[Tile]:
    """Of our variants, at the most threads that were measured."""
    ours = {v: r for v, r in _decoding(report, model).items() if not r.peer}
    speed = {v: ms for v, r in ours.items() if (ms := report.figures(r).tpot_ms)}
    top1 = _top1(report, model)
    if speed:
        fastest = min(speed, key=lambda v: speed[v])
        mark = f" {DISTURBED}" * (ours[fastest].status == "flagged")
        threads = _threads([ours[fastest]])
        yield Tile("fastest", fastest, f"{number(speed[fastest])} ms/token, {threads}{mark}")
    if sizes := {v: r.disk_bytes for v, r in ours.items() if r.disk_bytes}:
        smallest = min(sizes, key=lambda v: sizes[v])
        yield Tile("smallest", smallest, f"{sizes[smallest] / 1e6:.1f} MB on disk")
    quantised = {v for v, r in ours.items() if r.precision != "fp32"}
    divergence = {
        q.variant: q.fidelity["kl_mean"]
        for q in report.quality
        if q.model == model and q.fidelity and q.variant in quantised
    }
    if divergence:
        closest = min(divergence, key=lambda v: divergence[v])
        note = f"of those below fp32: top-1 agreement {top1[closest]:.2%}"
        yield Tile("most faithful", closest, note)
    if good := [v for v in speed if top1.get(v, 0) >= TOP1_TO_CHOOSE]:
        choice = min(good, key=lambda v: speed[v])
        note = f"the fastest with top-1 agreement ≥ {TOP1_TO_CHOOSE:.0%}"
        yield Tile("the one to choose", choice, note)


def _top1(report: Report, model: str) -> dict[str, float]:
    """Variant → agreement with the reference, whose own is 1."""
    return {
        q.variant: q.fidelity["top1"] if q.fidelity else 1.0
        for q in report.quality
        if q.model == model and (q.fidelity or q.variant == q.reference)
    }


def _results(report: Report, model: str, scenario: Scenario) -> list[CellResult]:
    """Cells with samples at the most threads that there are, ours first."""
    results = [
        r
        for r in report.cells
        if (r.cell.model, r.cell.scenario) == (model, scenario) and r.samples
    ]
    most = max((r.cell.threads for r in results), default=0)
    return sorted((r for r in results if r.cell.threads == most), key=lambda r: r.peer)


def _decoding(report: Report, model: str) -> dict[str, CellResult]:
    """Variant → its undisturbed cell with the shortest prompt; any where none is."""
    cells: dict[str, list[CellResult]] = {}
    for result in _results(report, model, "single-stream"):
        cells.setdefault(result.cell.variant, []).append(result)

    def rank(result: CellResult) -> tuple[bool, int]:
        return result.status == "flagged", result.cell.prompt_tokens

    return {variant: min(results, key=rank) for variant, results in cells.items()}


def _threads(results: Sequence[CellResult]) -> str:
    threads = results[0].cell.threads
    return "one thread" if threads == 1 else f"{threads} threads"


# -- sections -----------------------------------------------------------------------


def _choice(report: Report) -> Section:
    figures = []
    for model in report.models:
        decoding, top1 = _decoding(report, model), _top1(report, model)
        points = [
            Point(variant, ms, top1[variant] * 100, result.peer)
            for variant, result in decoding.items()
            if variant in top1 and (ms := report.figures(result).tpot_ms)
        ]
        if len(points) > 1:
            axes = ("ms per token (logarithmic)", "top-1 agreement, %")
            svg = pareto(f"Speed against fidelity, {model}", points, axes)
            threads = _threads(list(decoding.values()))
            figures.append(
                Figure(svg, f"{model}, {threads}. Further left is faster, higher truer.")
            )
    text = "What speed costs in fidelity: how often a variant predicts the reference's next token."
    return Section("Speed against fidelity", text, figures=figures)


def _single_stream(report: Report) -> Section:
    figures: list[Figure] = []
    for model in report.models:
        results = _results(report, model, "single-stream")
        if not results:
            continue
        threads = _threads(results)
        decoding = list(_decoding(report, model).values())
        steps = [
            Spread(r.cell.variant, values, peer=r.peer) for r in decoding if (values := r.steps())
        ]
        floor = [
            Spread(r.cell.variant, [ratio], peer=r.peer)
            for r in decoding
            if (ratio := report.figures(r).floor_ratio)
        ]
        figures += _first_tokens(model, results, "Time to first token")
        if steps:
            svg = spreads(f"Time per token, {model}", steps, "ms per token")
            figures.append(Figure(svg, f"{model}, {threads}. {STEPS}"))
        if floor:
            svg = bars(f"Against the bandwidth floor, {model}", floor, "× the bandwidth floor", 1)
            figures.append(Figure(svg, f"{model}, {threads}. {FLOOR}"))
    text = "Single-stream: each request begins when the one before is answered."
    return Section(
        "One request at a time", text, figures=figures, tables=speed_tables(report, "single-stream")
    )


def _variations(report: Report) -> Section:
    figures: list[Figure] = []
    for model in report.models:
        results = _results(report, model, "variations")
        figures += _first_tokens(model, results, "Time to first token under another command")
    text = (
        "Variations: one request under two commands in turn. What was computed for the last "
        "prompt need not be computed again where the engine keeps it."
    )
    return Section(
        "Variations of a request", text, figures=figures, tables=speed_tables(report, "variations")
    )


def _first_tokens(model: str, results: Sequence[CellResult], title: str) -> Iterable[Figure]:
    rows = [
        Spread(r.cell.variant, values, f"{r.cell.prompt_tokens} tokens", r.peer)
        for r in results
        if (values := r.values("ttft_ms"))
    ]
    if rows:
        svg = spreads(f"{title}, {model}", rows, "ms to the first token")
        yield Figure(svg, f"{model}, {_threads(results)}. {SPREAD}")


def _offline(report: Report) -> Section:
    figures = []
    for model in report.models:
        rows = [
            Spread(r.cell.variant, [rate], f"batch {r.cell.batch}", r.peer)
            for r in _results(report, model, "offline")
            if (rate := report.figures(r).tokens_per_second)
        ]
        if rows:
            svg = bars(f"Batch throughput, {model}", rows, "tokens per second, all rows together")
            figures.append(Figure(svg, f"{model}, {_threads(_results(report, model, 'offline'))}."))
    text = "Offline: all requests are there at once and are answered in batches of equal prompts."
    return Section("Batches", text, figures=figures, tables=speed_tables(report, "offline"))


def _server(report: Report) -> Section:
    figures = []
    target = report.settings.get("target_ms")
    for model in report.models:
        results = _results(report, model, "server")
        several = len({r.cell.concurrency for r in results}) > 1
        groups = [
            f"{r.cell.rate:g}/s" + f", {r.cell.concurrency} workers" * several for r in results
        ]
        latency = [
            Spread(r.cell.variant, values, group, r.peer)
            for r, group in zip(results, groups, strict=True)
            if (values := r.values("latency_ms"))
        ]
        goodput = [
            Spread(r.cell.variant, [rate], group, r.peer)
            for r, group in zip(results, groups, strict=True)
            if (rate := report.figures(r).goodput) is not None
        ]
        if latency:
            svg = spreads(
                f"Latency under load, {model}", latency, "ms from arrival to end", target, apart=0.4
            )
            caption = f"{model}. Waiting included; colours: requests that arrive."
            if target:
                caption += f" Dashed: the target of {target:g} ms."
            figures.append(Figure(svg, caption))
        if any(row.values[0] for row in goodput):
            svg = bars(f"Goodput, {model}", goodput, f"requests/s answered within {target:g} ms")
            figures.append(Figure(svg, f"{model}. Requests that kept the target, per second."))
    text = "Server: requests arrive at random times (a Poisson process) and may wait."
    return Section(
        "Requests at random times", text, figures=figures, tables=speed_tables(report, "server")
    )


def _quality(report: Report) -> Section:
    figures = []
    for quality in report.quality:
        if not quality.words:
            continue
        asked = [a for a, _ in quality.words]
        band = [(n, *tolerance(n)) for n in range(min(asked), max(asked) + 1)]
        points = [(a, got, n) for (a, got), n in sorted(Counter(quality.words).items())]
        title = f"Words asked and got, {quality.model} {quality.variant}"
        svg = scatter(title, points, band, ("words asked", "words got"), (3.5, 3.1))
        said = f": {quality.adherence['within']:.1%} within" if quality.adherence else ""
        figures.append(Figure(svg, f"{quality.model}, {quality.variant}{said}"))
    text = (
        "Fidelity compares the predictions with the reference's on one set of texts for all; "
        "adherence counts the words that the model alone writes when it is asked for a number."
    )
    if figures:
        text += " Bubbles: how many answers; green: the tolerance."
    tables = quality_tables(report)
    return Section("Fidelity and adherence", text, figures=figures, tables=tables, small=True)


def _endurance(report: Report) -> Section:
    figures = []
    for model in report.models:
        series = [
            Line(e.variant, e.rss_mb) for e in report.endurance if e.model == model and e.rss_mb
        ]
        if series:
            svg = lines(f"Memory over time, {model}", series, ("requests answered", "resident MB"))
            figures.append(Figure(svg, f"{model}, one process per variant."))
    text = "A level line after the start means that nothing leaks."
    return Section("Memory over time", text, figures=figures, tables=endurance_tables(report))


# -- records ------------------------------------------------------------------------


def _machine(report: Report) -> Section:
    known = {k: v for k, v in report.machine.items() if v not in (None, "", [], {})}
    unknown = ", ".join(_plain(k) for k in report.machine if k not in known)
    facts = [_fact(name, value) for name, value in known.items()]
    if read := bandwidth(report):
        facts.append(("bandwidth", read))
    facts.append(("energy", energy(report)))
    if unknown:
        facts.append(("not known here", unknown))
    return Section("The machine", facts=facts)


def _settings(report: Report) -> Section:
    facts = [
        _fact(name, value)
        for name, value in report.settings.items()
        if name != "energy" and value is not None
    ]
    facts += [(model, _said(about)) for model, about in report.models.items()]
    return Section("Command and settings", code=report.command, facts=facts)


_NAMES = {"cpu": "CPU", "isa": "instruction sets", "mhz": "clock MHz"}
_UNITS = {"_mb": " MB", "_kb": " KiB", "_ms": " ms", "_s": " s", "_mhz": " MHz"}


def _fact(name: str, value: Any) -> tuple[str, str]:
    for ending, unit in _UNITS.items():
        if name.endswith(ending) and not isinstance(value, str):
            return _plain(name.removesuffix(ending)), f"{value:g}{unit}"
    return _plain(name), _said(value)


def _plain(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_plain(str(k))} {_said(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _definitions(report: Report) -> Section:
    there: dict[str, object] = {r.cell.scenario: True for r in report.cells if r.samples}
    there |= {"all": there, "quality": report.quality, "endurance": report.endurance}
    facts = [f for part, texts in DEFINITIONS.items() if there.get(part) for f in texts.items()]
    return Section("What the figures mean", facts=facts)
