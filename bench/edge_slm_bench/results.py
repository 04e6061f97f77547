"""Report schema: cells, samples, figures.

A report is JSON (`Report.as_dict`, `Report.read`); tables, Markdown, CSV, HTML and
comparisons are made of it and add nothing. Figures are medians and percentiles over
the samples of unflagged processes; where every process was flagged, over all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edge_slm_runtime.errors import DataError
from edge_slm_runtime.files import read_text

SCHEMA_VERSION = 1
Scenario = Literal["single-stream", "variations", "offline", "server"]
SCENARIOS: tuple[Scenario, ...] = ("single-stream", "variations", "offline", "server")
# ok: at least one process was undisturbed. flagged: none was. The rest has no figures.
Status = Literal["ok", "flagged", "failed", "skipped", "interrupted"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the sweep. batch counts in the offline scenario alone, concurrency
    (workers) and rate (requests/s that arrive) in that of a server."""

    model: str
    variant: str
    threads: int
    scenario: Scenario
    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    concurrency: int = 1
    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Timing:
    """One request, or one batch: `new_tokens` is the sum over its rows.

    ttft_ms: to the first token, tokenising included; None for a batch. steps_ms: the
    intervals between tokens, where the engine reports them. In the server scenario both
    times run from the arrival of the request, waiting included.
    """

    total_ms: float
    new_tokens: int
    ttft_ms: float | None = None
    steps_ms: tuple[float, ...] = ()

    @property
    def tpot_ms(self) -> float | None:
        """(latency - TTFT) / (new tokens - 1)."""
        if self.ttft_ms is None or self.new_tokens < 2:
            return None
        return (self.total_ms - self.ttft_ms) / (self.new_tokens - 1)


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """What one fresh process measured, warm-up left out.

    cold: whether the model's files were out of the page cache when it loaded them.
    flags: what disturbed it (`conditions.Watch`), empty when nothing did. seconds: wall
    time of all timings together. joules: of the same span; None where no counter is.
    bandwidth, best_bandwidth: bytes/s that the cell's threads read from memory just before,
    in the median pass and in the best one.
    """

    round: int
    load_ms: float
    cold: bool
    timings: tuple[Timing, ...]
    seconds: float
    peak_rss_mb: float
    joules: float | None = None
    flags: tuple[str, ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)
    bandwidth: float | None = None
    best_bandwidth: float | None = None

    @property
    def tpot_ms(self) -> float | None:
        return median([t.tpot_ms for t in self.timings if t.tpot_ms is not None])


@dataclass(frozen=True, slots=True)
class CellResult:
    """A cell and its samples. reason: why it has none, or what flagged it."""

    cell: Cell
    engine: str
    precision: str
    peer: bool
    disk_bytes: int
    step_bytes: int
    status: Status
    reason: str = ""
    samples: tuple[ProcessSample, ...] = ()

    @property
    def used(self) -> tuple[ProcessSample, ...]:
        """The undisturbed samples; all of them where none is."""
        return tuple(s for s in self.samples if not s.flags) or self.samples

    def values(self, name: str) -> list[float]:
        """Every sample of a figure of `FIGURES` (one per request, interval or process)."""
        return [float(v) for v in FIGURES[name].values(self)]

    def figures(self, target_ms: float | None = None) -> Figures:
        """What a row of the table shows; None where it does not apply.

        target_ms: latency that a request of the server scenario must keep.
        """
        timings = [t for s in self.used for t in s.timings]
        seconds = sum(s.seconds for s in self.used)
        tokens = sum(t.new_tokens for t in timings)
        tpot, ttft = median(self.values("tpot_ms")), median(self.values("ttft_ms"))
        joules = [s.joules for s in self.used]
        known = all(j is not None for j in joules) and tokens
        kept = [t for t in timings if target_ms is not None and t.total_ms <= target_ms]
        single = self.cell.scenario != "offline"
        return Figures(
            load_cold_ms=median([s.load_ms for s in self.used if s.cold]),
            load_ms=median(self.values("load_ms")),
            ttft_ms=ttft,
            tpot_ms=tpot,
            tpot_p90_ms=percentile(self.steps(), 90),
            tpot_p99_ms=percentile(self.steps(), 99),
            latency_p50_ms=percentile(self.values("latency_ms"), 50) if single else None,
            latency_p90_ms=percentile(self.values("latency_ms"), 90) if single else None,
            latency_p99_ms=percentile(self.values("latency_ms"), 99) if single else None,
            pp_per_second=self.cell.prompt_tokens / ttft * 1e3 if ttft else None,
            tg_per_second=1e3 / tpot if tpot else None,
            tokens_per_second=median(self.values("tokens_per_second")),
            goodput=len(kept) / seconds if target_ms is not None and seconds else None,
            peak_rss_mb=median(self.values("peak_rss_mb")),
            joules_per_token=sum(j or 0 for j in joules) / tokens if known else None,
            floor_ratio=self._floor_ratio("bandwidth"),
            best_floor_ratio=self._floor_ratio("best_bandwidth"),
            processes=len(self.used),
            flagged=sum(bool(s.flags) for s in self.samples),
        )

    def _floor_ratio(self, bandwidth: str) -> float | None:
        pairs = [(s.tpot_ms, getattr(s, bandwidth)) for s in self.used if self.step_bytes]
        return median([ms * rate / (self.step_bytes * 1e3) for ms, rate in pairs if ms and rate])

    def steps(self) -> list[float]:
        """In ms: intervals between tokens; a request's mean where its engine reports none."""
        timings = [t for s in self.used for t in s.timings]
        steps = [step for t in timings for step in t.steps_ms]
        return steps or [t.tpot_ms for t in timings if t.tpot_ms is not None]


@dataclass(frozen=True, slots=True)
class Figures:
    """ms, tokens/s, MB (2²⁰ bytes), J/token; goodput in requests/s within the target.

    tpot_ms is the median over requests; its p90 and p99 are over single steps.
    floor_ratio: decode time ÷ the time that reading the weights once took just before, in
    the median pass (best_floor_ratio: in the best one); the median over processes.
    """

    load_cold_ms: float | None
    load_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    tpot_p90_ms: float | None
    tpot_p99_ms: float | None
    latency_p50_ms: float | None
    latency_p90_ms: float | None
    latency_p99_ms: float | None
    pp_per_second: float | None
    tg_per_second: float | None
    tokens_per_second: float | None
    goodput: float | None
    peak_rss_mb: float | None
    joules_per_token: float | None
    floor_ratio: float | None
    best_floor_ratio: float | None
    processes: int
    flagged: int

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that has samples: how to get them, and which way is better."""

    label: str
    unit: str
    higher_is_better: bool
    values: Callable[[CellResult], Iterable[float]]


def _timed(get: Callable[[Timing], float | None]) -> Callable[[CellResult], Iterable[float]]:
    return lambda r: (v for s in r.used for t in s.timings if (v := get(t)) is not None)


FIGURES: Mapping[str, Figure] = {
    "ttft_ms": Figure("TTFT", "ms", False, _timed(lambda t: t.ttft_ms)),
    "tpot_ms": Figure("TPOT", "ms", False, _timed(lambda t: t.tpot_ms)),
    "latency_ms": Figure("latency", "ms", False, _timed(lambda t: t.total_ms)),
    "tokens_per_second": Figure(
        "throughput",
        "tokens/s",
        True,
        lambda r: (sum(t.new_tokens for t in s.timings) / s.seconds for s in r.used if s.seconds),
    ),
    "load_ms": Figure(
        "load, warm", "ms", False, lambda r: (s.load_ms for s in r.used if not s.cold)
    ),
    "peak_rss_mb": Figure("peak RSS", "MB", False, lambda r: (s.peak_rss_mb for s in r.used)),
}


@dataclass(frozen=True, slots=True)
class Quality:
    """What a variant's predictions are worth, on one evaluation set for all.

    fidelity: `Fidelity.as_dict` against `reference`'s logits, None for the reference.
    adherence: share of answers within the words' tolerance, mean absolute error in
    words, Spearman(asked, got), share of texts equal to the reference's; None for peers.
    words: (asked, got) of every answer, the model alone (no length promise). differing:
    way of decoding → how many of these answers it changes (`consistency`).
    """

    model: str
    variant: str
    peer: bool
    reference: str
    evaluation: str
    fidelity: Mapping[str, float] | None = None
    adherence: Mapping[str, float] | None = None
    words: tuple[tuple[int, int], ...] = ()
    differing: Mapping[str, int] | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Endurance:
    """Resident memory over many requests of one process: (requests done, MB)."""

    model: str
    variant: str
    requests: int
    rss_mb: tuple[tuple[int, float], ...]
    reason: str = ""

    @property
    def growth_mb(self) -> float | None:
        """From a tenth of the requests, when every buffer exists, to the end."""
        if len(self.rss_mb) < 2:
            return None
        settled = next(mb for n, mb in self.rss_mb if n >= self.requests // 10)
        return self.rss_mb[-1][1] - settled


@dataclass(frozen=True, slots=True)
class Report:
    """machine: `Machine.as_dict`. settings: of the command, with `target_ms` and `energy`
    (the counter, or why there is none). models: name → digest, shape, path."""

    command: str
    started: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    cells: tuple[CellResult, ...]
    quality: tuple[Quality, ...] = ()
    endurance: tuple[Endurance, ...] = ()
    interrupted: bool = False

    def figures(self, result: CellResult) -> Figures:
        """The row of a cell, with this report's latency target."""
        served = result.cell.scenario == "server"
        return result.figures(self.settings.get("target_ms") if served else None)

    def bandwidth(self) -> dict[int, float]:
        """Threads → bytes/s that they read, by the median over processes."""
        by_threads: dict[int, list[float]] = {}
        for result in self.cells:
            read = (s.bandwidth for s in result.used if s.bandwidth)
            by_threads.setdefault(result.cell.threads, []).extend(read)
        return {threads: mid for threads, rates in by_threads.items() if (mid := median(rates))}

    def as_dict(self) -> dict[str, Any]:
        data = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        for shown, result in zip(data["cells"], self.cells, strict=True):
            shown["figures"] = self.figures(result).as_dict()
        return data

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """Raises DataError when the file is not a report of this schema."""
        try:
            data = json.loads(read_text(Path(path)))
            if data["schema_version"] != SCHEMA_VERSION:
                raise DataError(
                    f"{path} is a report of schema {data['schema_version']}",
                    f"this version reads schema {SCHEMA_VERSION}",
                )
            return cls.of(data)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is not a report of edge-slm bench: {error}") from None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Report:
        known = {k: v for k, v in data.items() if k != "schema_version"}
        return cls(
            **{
                **known,
                "cells": tuple(_cell_result(c) for c in data["cells"]),
                "quality": tuple(
                    Quality(**{**q, "words": tuple(map(tuple, q["words"]))})
                    for q in data["quality"]
                ),
                "endurance": tuple(
                    Endurance(**{**e, "rss_mb": tuple(map(tuple, e["rss_mb"]))})
                    for e in data["endurance"]
                ),
            }
        )


def _cell_result(data: Mapping[str, Any]) -> CellResult:
    known = {k: v for k, v in data.items() if k != "figures"}
    samples = tuple(sample_of(s) for s in data["samples"])
    return CellResult(**{**known, "cell": Cell(**data["cell"]), "samples": samples})


def sample_of(data: Mapping[str, Any]) -> ProcessSample:
    timings = tuple(
        Timing(**{**t, "steps_ms": tuple(t.get("steps_ms", ()))}) for t in data["timings"]
    )
    return ProcessSample(**{**data, "timings": timings, "flags": tuple(data["flags"])})


def with_sample(result: CellResult, sample: ProcessSample) -> CellResult:
    """The cell with one process more, its status brought up to date."""
    samples = (*result.samples, sample)
    undisturbed = any(not s.flags for s in samples)
    flags = dict.fromkeys(flag for s in samples for flag in s.flags)
    return replace(
        result,
        samples=samples,
        status="ok" if undisturbed else "flagged",
        reason="; ".join(flags),
    )


def median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def percentile(values: Sequence[float], q: float) -> float | None:
    """None of fewer values than one in the tail needs: 10 for the 90th, 100 for the 99th."""
    enough = len(values) * (100 - q) >= 100 or (len(values) > 0 and q <= 50)
    return float(np.percentile(values, q)) if enough else None
