"""The result of comparing two reports (`edge_slm_bench.compare` makes it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one cell, or of one variant, in both reports.

    before, after: medians. ratio: after ÷ before, its 95% interval None where there is none.
    worse: the ratio, or 1 ÷ ratio where more is better. processes: on either side; 0 for
    quality, which is exact for its texts. verdict: "slower", "faster", "more memory", … for
    a change beyond the tolerance whose interval excludes 1; "unsure" where the interval does
    not; "disturbed" where a side was; else "same".
    """

    cell: Mapping[str, Any]
    figure: str
    before: float
    after: float
    ratio: float
    low: float | None
    high: float | None
    worse: float
    processes: tuple[int, int]
    verdict: str
    regression: bool

    @property
    def line(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return (
            f"{where(self.cell)}, {self.figure}: {self.before:.4g} → {self.after:.4g}, "
            f"{self.ratio:.2f}×{interval}: {self.verdict}"
        )


@dataclass(frozen=True, slots=True)
class Broken:
    """A cell that was measured before and failed now."""

    cell: Mapping[str, Any]
    reason: str

    @property
    def line(self) -> str:
        return f"{where(self.cell)}: failed, was measured before: {self.reason}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """drift: the median of the undisturbed speed changes, as `Change.worse`; None without
    any. only_before, only_after: cells that one report alone has measured, described."""

    before: str
    after: str
    tolerance: float
    changes: tuple[Change, ...]
    broken: tuple[Broken, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    drift: float | None
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change | Broken, ...]:
        return (*self.broken, *(change for change in self.changes if change.regression))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the regressions' lines."""
        return {**asdict(self), "regressions": [regression.line for regression in self.regressions]}


def where(cell: Mapping[str, Any]) -> str:
    """model variant, then what sets the cell apart."""
    if "scenario" not in cell:
        return f"{cell['model']} {cell['variant']}"
    extra = {
        "single-stream": "",
        "variations": ", variations",
        "offline": f", batch {cell['batch']}",
        "server": f", {cell['concurrency']} workers, {cell['rate']:g} requests/s",
    }[cell["scenario"]]
    threads = "1 thread" if cell["threads"] == 1 else f"{cell['threads']} threads"
    return (
        f"{cell['model']} {cell['variant']}, {threads}, "
        f"{cell['prompt_tokens']}→{cell['new_tokens']} tokens{extra}"
    )
