"""Timings as ratios to a reference kernel that runs beside them.

A throttled machine, or one whose caches and memory others use, slows both, so their
ratio stays where a time in milliseconds would move. Kernel and code take turns: every
round of the code is divided by the mean of the kernel's runs right before and right
after it. The figure is the median of these ratios, its spread the interval that holds
the true median with 95% confidence; ratios are compared with a baseline of the same
CPU. Times are CPU time: waiting while another process has the core is not the code's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil, comb
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np

from edge_slm_bench.machine import Machine
from edge_slm_runtime.errors import DataError
from edge_slm_runtime.files import write_text

Kernel = Callable[[], object]
Paired = Callable[[Callable[[], object], Kernel], None]  # the fixture of `bench/benchmarks`
CLOCK = process_time  # seconds, of all threads
LEAST_ROUNDS = 9  # below 6 no interval of 95% exists; some more keep one outlier out of it


def compute_kernel() -> Kernel:
    """Some ms of small matrix products over 21 MB: arithmetic and memory, as in a model.

    Products of 48 × 48 stay below the size from which BLAS calls other threads, whose
    waiting for a core would be most of the time on a busy machine.
    """
    random = np.random.default_rng(0)
    shape = (768, 48, 48)
    left = random.standard_normal(shape, np.float32)
    right = random.standard_normal(shape, np.float32)
    out = np.empty_like(left)
    return lambda: np.matmul(left, right, out=out)


def memory_kernel() -> Kernel:
    """Copies 12 MB: what one decode step of a small int8 model reads."""
    source = np.ones(3_000_000, np.float32)
    out = np.empty_like(source)
    return lambda: np.copyto(out, source)


def interpreter_kernel() -> Kernel:
    """Some ms of Python objects and short numpy calls: as in tokenising and sampling."""
    vector = np.random.default_rng(0).standard_normal(6144)

    def run() -> float:
        seen: dict[tuple[int, str], list[int]] = {}
        total = 0.0
        for i in range(3000):
            seen.setdefault((i % 97, str(i % 13)), []).append(i)
            if i % 50 == 0:
                total += float(np.cumsum(np.exp(vector))[-1]) + int(vector.argmax())
        return total + len(sorted(seen))

    return run


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time of one call ÷ time of one kernel run: median and its 95% interval.

    kernel_ms: the kernel's median, which shows a disturbed run. pairs: rounds.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    kernel_ms: float

    def __str__(self) -> str:
        return f"{self.ratio:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def exceeds(self, baseline: float, factor: float) -> bool:
        """Whether even the low end of the interval is above `baseline` × `factor`."""
        return self.low > baseline * factor


@dataclass(frozen=True, slots=True)
class Turns:
    """How often each side runs per round, so that both take about as long, and the rounds."""

    calls: int
    kernel_runs: int
    rounds: int

    @classmethod
    def within(cls, seconds: float, call: float, kernel: float, least: int) -> Turns:
        """Rounds for about `seconds`, at least `least`; call, kernel: seconds of each alone."""
        calls, runs = max(1, round(kernel / call)), max(1, round(call / kernel))
        return cls(calls, runs, max(least, ceil(seconds / (calls * call + runs * kernel))))


class Beside:
    """The kernel's side: call it before the first round and after each."""

    def __init__(self, kernel: Kernel, runs: int) -> None:
        self._kernel = kernel
        self._runs = runs
        self.seconds: list[float] = []

    def __call__(self) -> None:
        start = CLOCK()
        for _ in range(self._runs):
            self._kernel()
        self.seconds.append((CLOCK() - start) / self._runs)


def seconds_of(call: Callable[[], object], least: float = 0.005) -> float:
    """Seconds of one call: the quickest of three tries of at least `least` seconds each."""

    def tried(calls: int) -> float:
        start = CLOCK()
        for _ in range(calls):
            call()
        return CLOCK() - start

    calls = 1
    while (took := tried(calls)) < least:
        calls *= 4
    return min(took, tried(calls), tried(calls)) / calls


def ratio_of(calls: Sequence[float], kernel: Sequence[float]) -> Ratio:
    """Of n rounds (seconds per call) and n + 1 kernel times, one before and one after each.

    Raises ValueError when the counts do not fit.
    """
    around = [(before + after) / 2 for before, after in pairwise(kernel)]
    ratios = [call / beside for call, beside in zip(calls, around, strict=True)]
    low, high = median_interval(ratios)
    return Ratio(median(ratios), low, high, len(ratios), median(kernel) * 1e3)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of the true median, whatever the distribution (for less than 6: all values).

    The k-th smallest and k-th largest value, with the largest k for which a fair coin
    gives less than k heads in n throws at most in (1 - confidence) / 2 of the cases.
    """
    n, k, tail = len(values), 0, 0.0
    while (tail := tail + comb(n, k) / 2**n) <= (1 - confidence) / 2:
        k += 1
    ordered, k = sorted(values), max(k, 1)
    return ordered[k - 1], ordered[-k]


class Baseline:
    """Ratios of earlier runs: {CPU: {benchmark: ratio}} in a JSON file."""

    def __init__(self, path: Path, cpu: str) -> None:
        """Raises DataError when the file is there and not of this form."""
        self._path = path
        self.cpu = cpu
        self._all: dict[str, dict[str, float]] = {}
        if path.exists():
            try:
                data = json.loads(path.read_text("utf-8"))
                self._all = {c: {n: float(r) for n, r in b.items()} for c, b in data.items()}
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise DataError(f"{path} holds no baselines: {error}", "remove it") from None

    @property
    def ratios(self) -> Mapping[str, float]:
        """Benchmark → ratio on this CPU; empty where there was no run."""
        return self._all.get(self.cpu, {})

    def save(self, measured: Mapping[str, Ratio]) -> None:
        """Puts these in the place of the older ones; written aside, then renamed."""
        new = {name: float(f"{ratio.ratio:.4g}") for name, ratio in measured.items()}
        self._all[self.cpu] = dict(sorted({**self.ratios, **new}.items()))
        text = json.dumps(dict(sorted(self._all.items())), indent=2) + "\n"
        write_text(text, self._path)


def cpu_name(record: Machine) -> str:
    """The CPU and what decides its kernels; virtual machines often hide the model itself."""
    return f"{record.cpu} ({' '.join(record.isa)})" if record.isa else record.cpu


def table(measured: Mapping[str, tuple[float, Ratio]], baseline: Mapping[str, float]) -> list[str]:
    """Lines for people; measured: benchmark → (median seconds of a call, ratio)."""
    rows = [("benchmark", "median CPU", "ratio to kernel [95%]", "baseline", "change")]
    for name, (seconds, ratio) in measured.items():
        known = baseline.get(name)
        rows.append(
            (
                name,
                f"{seconds * 1e3:.3f} ms",
                str(ratio),
                "–" if known is None else f"{known:.3g}",
                "–" if known is None else f"{ratio.ratio / known - 1:+.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
