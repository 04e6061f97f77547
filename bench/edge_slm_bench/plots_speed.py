"""Plots of speed, memory and the choice between variants, as SVG text (`plots`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from edge_slm_bench.plots import INK, MUTED, SERIES, drawn

_WIDTH = 4.7  # inches: readable on a phone
Box = tuple[float, float, float, float]  # left, bottom, right, top
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True, slots=True)
class Spread:
    """Samples of one row; those of one group share a colour. peer: its name is set back."""

    name: str
    values: Sequence[float]
    group: str = ""
    peer: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """A variant between two figures."""

    name: str
    x: float
    y: float
    peer: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]


def spreads(
    title: str, rows: Sequence[Spread], label: str, mark: float | None = None, apart: float = 0
) -> str:
    """Distributions on a logarithmic axis: a line from the 1st to the 99th percentile, a
    bar over the middle half, a dot at the median, a speck at the slowest.

    mark: a limit. apart: how far the groups of a row stand from each other, in rows.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    groups = list(dict.fromkeys(row.group for row in rows))
    with drawn(title, (_WIDTH, _height(len(names), legend=len(groups) > 1))) as plot:
        ax = plot.axes
        for at, group in enumerate(groups):
            mine = [row for row in rows if row.group == group]
            y = np.array([names.index(row.name) for row in mine])
            y = y + apart * (at - (len(groups) - 1) / 2)
            low, q1, middle, q3, high = np.array(
                [np.percentile(row.values, [1, 25, 50, 75, 99]) for row in mine]
            ).T
            colour = SERIES[at % len(SERIES)]
            ax.hlines(y, low, high, color=colour, linewidth=1.4, alpha=0.6)
            ax.hlines(y, q1, q3, color=colour, linewidth=6, alpha=0.35)
            ax.plot([max(row.values) for row in mine], y, ".", color=colour, markersize=3)
            ax.plot(middle, y, "o", color=colour, markersize=5)
        if mark is not None:
            ax.axvline(mark, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        _log(ax.xaxis, ax)
        _names(ax, [(row.name, row.peer) for row in rows])
        ax.set_xlabel(label)
        if len(groups) > 1:
            _legend(plot.figure, groups, "o")
    return plot.svg


def bars(title: str, rows: Sequence[Spread], label: str, mark: float | None = None) -> str:
    """The first value of every row as a bar with its number; peers are pale."""
    names = list(dict.fromkeys(row.name for row in rows))
    groups = list(dict.fromkeys(row.group for row in rows))
    step = 0.78 / len(groups)
    most = max(row.values[0] for row in rows)
    size = (_WIDTH, _height(len(names) * (1 + 0.45 * (len(groups) - 1)), legend=len(groups) > 1))
    with drawn(title, size) as plot:
        ax = plot.axes
        for row in rows:
            at, value = groups.index(row.group), row.values[0]
            y = names.index(row.name) + (at - (len(groups) - 1) / 2) * step
            colour, pale = SERIES[at % len(SERIES)], 0.4 if row.peer else 0.85
            ax.barh(y, value, step * 0.86, color=colour, alpha=pale, linewidth=0)
            text = f"{value:.0f}" if most >= 100 else f"{value:.2f}"
            ax.text(
                1.01,
                y,
                text,
                transform=ax.get_yaxis_transform(),
                va="center",
                fontsize=8.5,
                color=MUTED,
            )
        if mark is not None:
            ax.axvline(mark, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        from matplotlib.ticker import MaxNLocator

        ax.set_xlim(0, most * 1.02)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        _names(ax, [(row.name, row.peer) for row in rows])
        ax.set_xlabel(label)
        if len(groups) > 1:
            _legend(plot.figure, groups, "s")
    return plot.svg


def pareto(title: str, points: Sequence[Point], labels: tuple[str, str]) -> str:
    """Less x and more y is better: the points that nothing beats in both are joined."""
    best = front(points)
    with drawn(title, (_WIDTH, 4.8)) as plot:
        ax = plot.axes
        ax.step(
            [p.x for p in best], [p.y for p in best], where="post", color=SERIES[2], linewidth=1.6
        )
        for point in points:
            ax.plot(
                point.x,
                point.y,
                "D" if point.peer else "o",
                color=SERIES[1] if point.peer else SERIES[0],
                markersize=5.5 if point.peer else 7.5,
                alpha=0.9,
            )
        _log(ax.xaxis, ax)
        x, y = [p.x for p in points], [p.y for p in points]
        ax.set_xlim(min(x) / 1.25, max(x) * 1.25)
        room = (max(y) - min(y)) or 0.01
        ax.set_ylim(min(y) - 0.12 * room, max(y) + 0.3 * room)
        ax.set_yticks([tick for tick in ax.get_yticks() if tick <= max(y)])
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
        _label(plot, points, best)
        kinds = dict.fromkeys("peers" if p.peer else "ours" for p in points)
        for kind in sorted(kinds):
            peer = kind == "peers"
            marker, colour = ("D", SERIES[1]) if peer else ("o", SERIES[0])
            ax.plot([], [], marker, color=colour, markersize=6, label=kind)
        ax.plot([], [], color=SERIES[2], label="nothing is better in both")
        plot.figure.legend(loc="outside upper left", ncols=3, handletextpad=0.4)
    return plot.svg


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in x (less) and y (more), from the least x on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def lines(title: str, series: Sequence[Line], labels: tuple[str, str]) -> str:
    """Curves over a common x, from y = 0 on."""
    with drawn(title, (_WIDTH, 3.6)) as plot:
        ax = plot.axes
        for i, line in enumerate(series):
            x, y = zip(*line.points, strict=True)
            style = _DASHES[i // len(SERIES) % len(_DASHES)]
            ax.plot(x, y, color=SERIES[i % len(SERIES)], linestyle=style, label=line.name)
        ax.set_ylim(0, 1.08 * max(y for line in series for _, y in line.points))
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
        plot.figure.legend(loc="outside upper left", ncols=2 if len(series) > 1 else 1)
    return plot.svg


def _height(rows: float, legend: bool) -> float:
    return 0.75 + 0.27 * rows + 0.3 * legend


def _legend(figure: Any, groups: Sequence[str], marker: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=SERIES[i % len(SERIES)], marker=marker, linestyle="", label=group)
        for i, group in enumerate(groups)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handletextpad=0.2)


def _names(ax: Any, rows: Iterable[tuple[str, bool]]) -> None:
    names = dict(rows)
    ax.set_yticks(range(len(names)), list(names))
    for label, peer in zip(ax.get_yticklabels(), names.values(), strict=True):
        label.set_color(MUTED if peer else INK)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)


def _log(axis: Any, ax: Any) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_xscale("log")
    low, high = ax.get_xlim()
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label(plot: Any, points: Sequence[Point], best: Sequence[Point]) -> None:
    """Names beside their points, or near them where others are in the way; the front's
    names take their places first."""
    ax = plot.axes
    plot.figure.draw_without_rendering()
    scale = plot.figure.dpi / 72
    inside = ax.get_window_extent()
    place = {p.name: ax.transData.transform((p.x, p.y)) for p in points}
    taken = [_around(x, y, 9 * scale, 9 * scale) for x, y in place.values()]
    for a, b in pairwise(place[p.name] for p in best):
        taken += [(a[0], a[1] - 1, b[0], a[1] + 1), (b[0] - 1, a[1], b[0] + 1, b[1])]
    for point in sorted(points, key=lambda p: (p not in best, p.peer, p.x)):
        x, y = place[point.name]
        width, height = 4.9 * len(point.name) * scale, 10.5 * scale
        spots = [
            (x + side * (width / 2 + 6 * scale), y + up * scale)
            for up in (9, -9, 0, 20, -20, 31, -31, 42, -42, 53, -53, 64, -64)
            for side in ((1, -1) if abs(up) < 20 else (0, 0.5, -0.5, 1, -1))
        ]
        boxes = [_around(*spot, width, height) for spot in spots]
        costs = [
            _overlap(box, taken) + _outside(box, inside) + 4 * i for i, box in enumerate(boxes)
        ]
        chosen = costs.index(min(costs))
        taken.append(boxes[chosen])
        near = abs(spots[chosen][1] - y) < 15 * scale
        line = {"arrowstyle": "-", "color": MUTED, "alpha": 0.5, "linewidth": 0.7, "shrinkB": 3}
        ax.annotate(
            point.name,
            (point.x, point.y),
            xytext=((spots[chosen][0] - x) / scale, (spots[chosen][1] - y) / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            color=MUTED if point.peer else INK,
            arrowprops=None if near else line,
        )


def _around(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(box: Box, others: Iterable[Box]) -> float:
    return sum(
        max(0.0, min(box[2], o[2]) - max(box[0], o[0]))
        * max(0.0, min(box[3], o[3]) - max(box[1], o[1]))
        for o in others
    )


def _outside(box: Box, frame: Any) -> float:
    beyond = max(0, frame.x0 - box[0]) + max(0, box[2] - frame.x1)
    beyond += max(0, frame.y0 - box[1]) + max(0, box[3] - frame.y1)
    return float(100 * beyond)
