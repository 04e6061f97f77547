"""Everything that `edge-slm bench` measures, as one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from edge_slm_bench.energy import Unavailable, find_meter
from edge_slm_bench.evaluation import assess
from edge_slm_bench.machine import machine
from edge_slm_bench.metrics.examples import Example
from edge_slm_bench.results import Endurance, Quality, Report
from edge_slm_bench.runners.llama_cpp import instruction_sets
from edge_slm_bench.sweep import Model, Settings, Sweep, endurance


def run_bench(
    models: Sequence[Model],
    settings: Settings,
    *,
    command: str = "",
    examples: Mapping[str, Sequence[Example]] | None = None,
    endurance_requests: int = 0,
    journal: Path | None = None,
    report: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Report:
    """The sweep, then quality and endurance. Ctrl-C ends it early: the report then says
    so and has what was measured until then.

    command: how it was asked for. examples: model's name → evaluation texts; a model
    without them has no quality. endurance_requests: 0 leaves it out. journal: file for
    every sample as it comes. report: called with (steps done, all steps, what was done).
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    examples = examples or {}
    sweep = Sweep(models, settings, journal)
    threads = max(settings.threads)
    assessed = [model for model in models if examples.get(model.name)]
    ours = [(m, spec) for m in models for spec in m.as_shipped if not spec.peer]
    enduring = ours if endurance_requests else []
    total = sweep.total + sum(len(m.as_shipped) for m in assessed) + len(enduring)
    count = 0

    def done(what: str) -> None:
        nonlocal count
        count += 1
        report(count, total, what)

    meter = find_meter()
    record = machine().as_dict()
    quality: list[Quality] = []
    memory: list[Endurance] = []
    interrupted = False
    try:
        sweep.run(lambda cell: done(f"{cell.model} {cell.variant}"))
        for model in assessed:
            quality += assess(model, examples[model.name], threads, done)
        for model, spec in enduring:
            memory.append(endurance(model, spec, threads, endurance_requests))
            done(f"{model.name} {spec.variant}, memory")
    except KeyboardInterrupt:
        interrupted = True
    return Report(
        command=command,
        started=started,
        machine=record,
        settings={
            **asdict(settings),
            "llama.cpp": instruction_sets() if _has_llama_cpp(models) else "",
            "energy": meter.reason if isinstance(meter, Unavailable) else meter.name,
        },
        models={model.name: model.as_dict() for model in models},
        cells=tuple(sweep.results.values()),
        quality=tuple(quality),
        endurance=tuple(memory),
        interrupted=interrupted,
    )


def _has_llama_cpp(models: Sequence[Model]) -> bool:
    return any(spec.runner == "llama_cpp" for model in models for spec in model.specs)
