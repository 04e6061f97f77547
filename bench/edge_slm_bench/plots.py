"""Plots as SVG text that takes its colours and its font from the page around it (`page`)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from edge_slm_runtime.errors import DependencyMissing

# matplotlib draws in these; in the SVG they become the page's variables.
_VARIABLES = {
    "#010101": "--ink", "#010102": "--muted", "#010103": "--grid",
    "#010111": "--s1", "#010112": "--s2", "#010113": "--s3", "#010114": "--s4",
}  # fmt: skip
INK, MUTED, GRID, *SERIES = _VARIABLES
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edge-slm",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """y with its interval at every x; None where it is not known. A single value is a
    level line."""

    name: str
    values: Sequence[float | None]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()


@dataclass(frozen=True, slots=True)
class Interval:
    """A row of a forest plot; rows of one group share a colour."""

    name: str
    value: float
    low: float | None
    high: float | None
    group: str


class Plot:
    """Filled by `drawn`: afterwards `svg` is the finished picture."""

    svg = ""

    def __init__(self, figure: Any, axes: Any) -> None:
        self.figure, self.axes = figure, axes


@contextmanager
def drawn(title: str, size: tuple[float, float] = (5.2, 3.9)) -> Iterator[Plot]:
    """Axes to draw in; size in inches. Raises DependencyMissing."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyMissing("plots need matplotlib", "pip install 'edge-slm[bench]'") from None
    with rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        plot = Plot(figure, figure.add_subplot())
        yield plot
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    plot.svg = _inline(out.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """Without the XML head, group ids (they repeat from plot to plot) and fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Spelled "font-family: …", or up to matplotlib 3.10 "font: 10px …".
    svg = re.sub(r'font-family: [^;"]*', "font-family: var(--font)", svg)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font: \1px var(--font)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    view = re.search(r'viewBox="[^"]*"', svg)
    label = escape(title, quote=True)
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view[0] if view else ""} role="img" aria-label="{label}">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)


def scatter(
    title: str,
    points: Sequence[tuple[float, float, int]],
    band: Sequence[tuple[float, float, float]],
    labels: tuple[str, str],
    size: tuple[float, float] = (5.2, 3.9),
) -> str:
    """(x, y, count) as bubbles on logarithmic axes, over a band of (x, low, high) and the
    diagonal."""
    with drawn(title, size) as plot:
        ax = plot.axes
        x, low, high = np.array(band).T
        ax.fill_between(x, low, high, color=SERIES[2], alpha=0.22, linewidth=0)
        ax.plot(x, x, color=SERIES[2], linewidth=1)
        x, y, count = np.array(points, float).T
        y = np.maximum(y, 1)
        ax.scatter(x, y, 7 + 60 * count / count.max(), color=SERIES[0], alpha=0.55, linewidth=0)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ticks = sorted(set(x))
        if len(ticks) > 8:
            ticks = [2.0**n for n in range(12) if ticks[0] <= 2**n <= ticks[-1]]
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(_fixed(ticks))
            axis.set_minor_locator(_fixed([]))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
    return plot.svg


def _fixed(ticks: Sequence[float]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(ticks)


def curves(
    title: str, ticks: Sequence[str], series: Sequence[Curve], labels: tuple[str, str]
) -> str:
    """Curves with their intervals as bands; a Curve of one value is a dashed line across."""
    with drawn(title) as plot:
        ax = plot.axes
        x = np.arange(len(ticks))
        for curve, colour in zip(series, SERIES, strict=False):
            if len(curve.values) == 1:
                ax.axhline(curve.values[0], color=colour, linestyle=(0, (5, 3)), label=curve.name)
                continue
            values, lows, highs = (
                np.array(part, float) for part in (curve.values, curve.lows, curve.highs)
            )
            if len(lows):
                ax.fill_between(x, lows, highs, color=colour, alpha=0.18, linewidth=0)
            ax.plot(x, values, color=colour, marker="o", markersize=4, label=curve.name)
        ax.set_xticks(x, ticks)
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
        if len(series) > 1:
            plot.figure.legend(loc="outside upper left", ncols=2)
    return plot.svg


def matrix(
    title: str,
    labels: Sequence[str],
    counts: Sequence[Sequence[int]],
    axes: tuple[str, str] = ("achieved", "asked"),
) -> str:
    """A confusion matrix: every row as shares of its own sum."""
    table = np.array(counts, float)
    total = table.sum(1, keepdims=True)
    shares = table / np.where(total, total, 1)
    size = len(labels)
    with drawn(title, (5.2, 4.6)) as plot:
        ax = plot.axes
        ax.grid(visible=False)
        for i, j in np.ndindex(size, size):
            share = shares[i, j]
            ax.bar(j, 0.94, 0.94, i - 0.47, color=SERIES[0], alpha=0.06 + 0.74 * share, linewidth=0)
            if share >= 0.005:
                text = f"{share:.0%}" if size <= 8 else f"{100 * share:.0f}"
                ax.text(j, i, text, ha="center", va="center", fontsize=9 if size <= 12 else 7)
        names = {"rotation": 35, "ha": "right"} if max(map(len, labels)) > 3 else {}
        ax.set_xticks(range(size), labels, **names)
        ax.set_yticks(range(size), labels)
        ax.set_xlim(-0.5, size - 0.5)
        ax.set_ylim(size - 0.5, -0.5)
        ax.set_xlabel(axes[0])
        ax.set_ylabel(axes[1])
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.tick_params(length=0)
    return plot.svg


def forest(title: str, rows: Sequence[Interval], mark: float, label: str) -> str:
    """Values with their intervals, one under the other, and a line at `mark`."""
    groups = list(dict.fromkeys(row.group for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    step = 0.8 / len(groups)
    with drawn(title, (5.2, 0.9 + 0.16 * len(names) * (len(groups) + 1.4))) as plot:
        ax = plot.axes
        ax.axvline(mark, color=MUTED, linewidth=1)
        for row in rows:
            at = groups.index(row.group)
            y = names.index(row.name) + (at - (len(groups) - 1) / 2) * step
            colour = SERIES[at % len(SERIES)]
            if row.low is not None and row.high is not None:
                ax.plot([row.low, row.high], [y, y], color=colour, linewidth=2.2, alpha=0.55)
            first = row.name == next(r.name for r in rows if r.group == row.group)
            ax.plot(
                row.value, y, "o", color=colour, markersize=5, label=row.group if first else None
            )
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(label)
        plot.figure.legend(loc="outside upper left", ncols=2)
    return plot.svg
