"""The sweep: which cells there are, and measuring them in turn, each in fresh processes.

Cells take turns: a machine that gets warmer or busier slows all of them, not the last
ones. The first round loads from a cold page cache, the others from a warm one.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_slm_bench.bandwidth import read_bandwidth
from edge_slm_bench.conditions import Watch
from edge_slm_bench.pagecache import evict
from edge_slm_bench.process import launch
from edge_slm_bench.prompts import prompts_of
from edge_slm_bench.results import (
    Cell,
    CellResult,
    Endurance,
    ProcessSample,
    Scenario,
    Status,
    sample_of,
    with_sample,
)
from edge_slm_bench.runners import Prompt, Spec
from edge_slm_bench.runners.edge_slm import spec_of, speculating
from edge_slm_runtime.bundle import Manifest, read_manifest
from edge_slm_runtime.engines import engine_class
from edge_slm_runtime.errors import DependencyMissing, EdgeSlmError, EngineNotInstalled

_PROMPTS = 8  # different ones that a cell takes in turn
_ENDURANCE_PROMPT, _ENDURANCE_TOKENS = 24, 4


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle, and its peers: other engines on the same weights. missing: peer's name →
    why it cannot be measured."""

    name: str
    bundle: Path
    manifest: Manifest
    specs: tuple[Spec, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def as_shipped(self) -> list[Spec]:
        """Without the rows that are a variant under other options."""
        return [spec for spec in self.specs if not spec.options]

    def as_dict(self) -> dict[str, Any]:
        facts = asdict(self.manifest.model)
        return {"path": str(self.bundle), "digest": self.manifest.digest, **facts}


@dataclass(frozen=True, slots=True)
class Settings:
    """The axes of the sweep, and how each cell is measured.

    repetitions: timed requests per process, after one warm-up. rounds: processes per
    cell. rates: requests/s that arrive at the server. memory_limit_mb, timeout_s: at
    which a process is killed, its row saying so.
    """

    threads: Sequence[int]
    prompt_tokens: Sequence[int] = (16, 64, 256)
    new_tokens: Sequence[int] = (48,)
    scenarios: Sequence[Scenario] = ("single-stream",)
    batches: Sequence[int] = (8,)
    concurrencies: Sequence[int] = (1,)
    rates: Sequence[float] = (4.0,)
    repetitions: int = 3
    server_requests: int = 20
    rounds: int = 5
    target_ms: float = 500.0
    memory_limit_mb: float | None = None
    timeout_s: float = 600.0


def model_of(
    bundle: Path,
    variants: Sequence[str] | None = None,
    peers: Sequence[Spec] = (),
    name: str = "",
    *,
    speculate: bool = False,
) -> Model:
    """speculate: numba variants with guessed tokens too. Raises a BundleError when
    the bundle cannot be read; unknown names in `variants` become rows that say so."""
    manifest = read_manifest(bundle)
    there = {v.name: v for v in manifest.variants}
    chosen = variants or list(there)
    missing = {n: f"the bundle has no variant {n}" for n in chosen if n not in there}
    specs: list[Spec] = []
    for variant in (there[n] for n in chosen if n in there):
        specs.append(spec_of(bundle, variant))
        if speculate and engine_class(variant.engine).guesses:
            specs.append(speculating(specs[-1]))
    return Model(name or bundle.name, bundle, manifest, (*specs, *peers), missing)


def plan(model: Model, settings: Settings) -> Iterator[tuple[Cell, str]]:
    """Every cell of a model, and why it cannot be measured: "" where it can."""
    s, room = settings, model.manifest.model.positions
    variants = {**{spec.variant: "" for spec in model.specs}, **model.missing}
    for scenario, threads, prompt, new in itertools.product(
        s.scenarios, s.threads, s.prompt_tokens, s.new_tokens
    ):
        full = "" if prompt + new <= room else f"{prompt} + {new} tokens do not fit {room}"
        for extra, (variant, reason) in itertools.product(_extras(scenario, s), variants.items()):
            cell = Cell(model.name, variant, threads, scenario, prompt, new, **extra)
            yield cell, reason or full


def _extras(scenario: Scenario, s: Settings) -> list[dict[str, Any]]:
    if scenario == "offline":
        return [{"batch": batch} for batch in s.batches]
    if scenario == "server":
        return [
            {"concurrency": c, "rate": r} for c, r in itertools.product(s.concurrencies, s.rates)
        ]
    return [{}]


class Sweep:
    """Measures the cells of some models; `results` is right at any moment."""

    def __init__(
        self, models: Sequence[Model], settings: Settings, journal: Path | None = None
    ) -> None:
        """journal: a JSONL file that every sample is written to as it comes."""
        self.settings = settings
        self.models = {model.name: model for model in models}
        self.results: dict[Cell, CellResult] = {}
        self._specs: dict[Cell, Spec] = {}
        self._prompts: dict[tuple[str, int, bool], list[Prompt]] = {}
        self._journal = journal
        for model in models:
            known = {spec.variant: spec for spec in model.specs}
            for cell, reason in plan(model, settings):
                if not reason:
                    self._specs[cell] = known[cell.variant]
                self.results[cell] = _unmeasured(cell, known.get(cell.variant), reason)

    @property
    def total(self) -> int:
        """Processes to be started."""
        return len(self._specs) * self.settings.rounds

    def run(self, done: Callable[[Cell], None] = lambda cell: None) -> None:
        """done: called after each process. Ctrl-C leaves as KeyboardInterrupt; what was
        measured until then stays."""
        for number in range(self.settings.rounds):
            for cell, spec in self._specs.items():
                if self.results[cell].status not in ("failed", "skipped"):
                    self._measure(cell, spec, number)
                done(cell)

    def _measure(self, cell: Cell, spec: Spec, number: int) -> None:
        try:
            sample = self._sample(cell, spec, number)
        except (DependencyMissing, EngineNotInstalled) as error:
            self.results[cell] = replace(self.results[cell], status="skipped", reason=str(error))
        except EdgeSlmError as error:
            self.results[cell] = replace(self.results[cell], status="failed", reason=str(error))
        else:
            self.results[cell] = with_sample(self.results[cell], sample)
            self._write({"cell": asdict(cell), "sample": asdict(sample)})

    def _sample(self, cell: Cell, spec: Spec, number: int) -> ProcessSample:
        s = self.settings
        served = cell.scenario == "server"
        job = {
            "kind": "speed",
            "spec": spec.as_dict(),
            "threads": cell.threads,
            "scenario": cell.scenario,
            "prompts": [asdict(p) for p in self._prompts_of(cell)],
            "new_tokens": cell.new_tokens,
            "batch": cell.batch,
            "concurrency": cell.concurrency,
            "rate": cell.rate,
            "repetitions": s.server_requests if served else s.repetitions,
            "round": number,
        }
        if cell.scenario == "variations":
            job["other"] = asdict(self._prompts_of(cell, other=True)[0])
        cold = number == 0 and evict(spec.path)
        with Watch() as watch:
            bandwidth = read_bandwidth(cell.threads)
            measured = launch(job, memory_limit_mb=s.memory_limit_mb, timeout_s=s.timeout_s)
        return sample_of(
            {
                "round": number,
                "cold": cold,
                "bandwidth": bandwidth.median,
                "best_bandwidth": bandwidth.best,
                "flags": watch.flags,
                "conditions": watch.as_dict(),
                **measured,
            }
        )

    def _prompts_of(self, cell: Cell, *, other: bool = False) -> list[Prompt]:
        key = (cell.model, cell.prompt_tokens, other)
        if key not in self._prompts:
            count = 1 if other else max(_PROMPTS, *self.settings.batches)
            bundle = self.models[cell.model].bundle
            self._prompts[key] = prompts_of(bundle, cell.prompt_tokens, count, other=other)
        return self._prompts[key]

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._journal:
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(f"{json.dumps(line)}\n")
                journal.flush()
                os.fsync(journal.fileno())


def _unmeasured(cell: Cell, spec: Spec | None, reason: str) -> CellResult:
    status: Status = "skipped" if reason else "interrupted"
    reason = reason or "stopped before its first process"
    return CellResult(
        cell,
        engine=spec.engine if spec else "",
        precision=spec.precision if spec else "",
        peer=spec.peer if spec else False,
        disk_bytes=spec.disk_bytes if spec else 0,
        step_bytes=spec.step_bytes if spec else 0,
        status=status,
        reason=reason,
    )


def endurance(model: Model, spec: Spec, threads: int, requests: int) -> Endurance:
    """Resident memory of one process over `requests` short answers."""
    prompts = prompts_of(model.bundle, _ENDURANCE_PROMPT, _PROMPTS)
    job = {
        "kind": "endurance",
        "spec": spec.as_dict(),
        "threads": threads,
        "prompts": [asdict(p) for p in prompts],
        "new_tokens": _ENDURANCE_TOKENS,
        "requests": requests,
    }
    try:
        series = tuple((int(n), float(mb)) for n, mb in launch(job)["rss_mb"])
    except EdgeSlmError as error:
        return Endurance(model.name, spec.variant, requests, (), str(error))
    return Endurance(model.name, spec.variant, requests, series)
