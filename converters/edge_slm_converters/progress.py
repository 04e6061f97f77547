"""How far a conversion is."""

from __future__ import annotations

from collections.abc import Callable

# Called before each step with a line that names it, and the share of all work done.
Report = Callable[[str, float], None]


class Progress:
    """Adds up the work of the steps: total, of all of them, in the unit of `step`."""

    def __init__(self, report: Report | None, total: float) -> None:
        self._report, self._total, self._done = report, total, 0.0

    def step(self, line: str, work: float) -> None:
        """A step begins."""
        if self._report:
            self._report(line, min(self._done / self._total, 1.0))
        self._done += work
