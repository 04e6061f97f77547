"""Whether a pass is computed by all threads or by the caller alone: whichever has been quicker.

How much a second thread gains depends on the model, the processor and, most of all, on what else
runs: threads meet many times in a pass, and where one of them has lost its core, all wait for it.
So both ways are timed as the passes go. The answers are the same bits either way.
"""

from __future__ import annotations

GAIN = 1.1  # by which all threads must be quicker: they take more energy
_TRIAL = 4  # passes of a way before it is judged; the first one is not, since threads sleep
_MEMORY = 16  # passes of which the mean is kept, about
_SOON, _LATE = 32, 1024  # passes until the other way is tried again: twice as many each time


class Pace:
    """Of passes with as many tokens, which take about equally long. alone: the way of the next."""

    def __init__(self, *, alone: bool) -> None:
        self.alone = alone
        self._seconds: dict[bool, float] = {}  # of a pass, by `alone`: moving means
        self._passes = 0  # of this way, in a row
        self._patience = _SOON

    def note(self, seconds: float) -> None:
        """What the pass took."""
        way, self._passes = self.alone, self._passes + 1
        if self._passes == 1:
            return
        mean = seconds if self._passes == 2 else self._seconds[way]
        step = min(seconds, 3 * mean) - mean  # a single interruption is no load
        self._seconds[way] = mean + step / min(self._passes - 1, _MEMORY)
        if self._passes < _TRIAL:
            return
        if (not way) not in self._seconds:
            self._turn()
        elif (self._seconds[True] <= self._seconds[False] * GAIN) is not way:
            if self._passes > _TRIAL:  # it has become slow; else it lost its trial
                self._patience = _SOON
            self._turn()
        elif self._passes >= self._patience:
            self._patience = min(2 * self._patience, _LATE)
            self._turn()

    def _turn(self) -> None:
        self.alone, self._passes = not self.alone, 0
