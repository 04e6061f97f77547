"""A benchmark report as `edge-slm bench` makes them, of invented figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edge_slm_bench.results import (
    Cell,
    CellResult,
    Endurance,
    ProcessSample,
    Quality,
    Report,
    Status,
    Timing,
    with_sample,
)


@dataclass(frozen=True)
class Kind:
    """A variant of the 98M model; the 11M one is a tenth of it. ms, MB, nats."""

    engine: str
    precision: str
    peer: bool
    load: float
    ttft: float  # of 64 tokens
    tpot: float
    rss: float
    disk: float
    top1: float
    kl: float
    batch_8: float


KINDS: Mapping[str, Kind] = {
    "onnx-fp32": Kind("onnxruntime", "fp32", False, 940, 44, 10.4, 516, 392, 1, 3e-10, 310),
    "onnx-int8": Kind("onnxruntime", "int8", False, 566, 18, 3.5, 236, 100, 0.981, 0.0012, 560),
    "onnx-int4": Kind("onnxruntime", "int4", False, 540, 32, 2.4, 226, 67, 0.924, 0.018, 370),
    "ctranslate2-int8": Kind("ctranslate2", "int8", False, 517, 45, 12, 209, 99, 0.976, 0.002, 350),
    "transformers-fp32": Kind("transformers", "fp32", True, 2900, 132, 30, 811, 392, 1, 0, 98),
    "llama.cpp-Q8_0": Kind("llama.cpp", "int8", True, 230, 103, 6.3, 179, 106, 0.994, 4e-4, 221),
}
SCALES = {"random-98m": 1.0, "reference-11m": 0.1}


def make_sample(
    random: np.random.Generator, kind: Kind, cell: Cell, round_: int, scale: float
) -> ProcessSample:
    """One process of three requests (or batches), nearly as quick as the others of its kind."""
    slow = scale * random.lognormal(0, 0.03) * (1.8 if cell.threads == 1 else 1)
    timings = []
    for _ in range(3):
        if cell.scenario == "offline":
            tokens = cell.batch * cell.new_tokens
            rate = kind.batch_8 * (0.5 + cell.batch / 16) / slow
            timings.append(Timing(tokens / rate * 1e3 * random.lognormal(0, 0.02), tokens))
            continue
        waiting = random.exponential(30 * slow * cell.rate) if cell.scenario == "server" else 0
        ttft = float(waiting + kind.ttft * slow * (cell.prompt_tokens / 64) ** 0.9)
        steps = kind.tpot * slow * random.lognormal(0, 0.06, cell.new_tokens - 1)
        told = () if kind.engine == "ctranslate2" else tuple(map(float, steps))
        timings.append(Timing(ttft + float(steps.sum()), cell.new_tokens, ttft, told))
    cold = round_ == 0
    busy = cell.threads == 2 and round_ == 3
    return ProcessSample(
        round=round_,
        load_ms=float(kind.load * (0.3 + 0.7 * scale) * (2.2 if cold else 1) * slow / scale),
        cold=cold,
        timings=tuple(timings),
        seconds=sum(t.total_ms for t in timings) / 1e3 if not cell.rate else 3 / cell.rate,
        peak_rss_mb=70 + kind.rss * scale,
        flags=("others used 1.4 of 2 cores",) if busy else (),
        bandwidth=(14.1e9 if cell.threads == 1 else 26.5e9) * (1 + round_ / 100),
    )


def measured(
    cell: Cell, seed: int = 0, rounds: int = 5, kinds: Mapping[str, Kind] = KINDS
) -> CellResult:
    """A cell of `kinds`, its samples drawn from `seed`."""
    kind, scale = kinds[cell.variant], SCALES[cell.model]
    name = sum(map(ord, cell.variant + cell.scenario))
    random = np.random.default_rng([seed, name, cell.prompt_tokens, cell.threads, int(cell.rate)])
    disk = int(kind.disk * 1e6 * scale)
    result = CellResult(
        cell, kind.engine, kind.precision, kind.peer, disk, int(disk * 0.87), "skipped"
    )
    for round_ in range(rounds):
        result = with_sample(result, make_sample(random, kind, cell, round_, scale))
    return result


def make_report(seed: int = 0, kinds: Mapping[str, Kind] = KINDS) -> Report:
    """Two models × the kinds, two numbers of threads, every scenario; one cell disturbed,
    one killed, one prompt too long, one peer not installed."""
    cells = []
    for model in SCALES:
        for variant in kinds:
            for threads in (1, 2):
                for prompt in (16, 64, 256):
                    result = measured(
                        Cell(model, variant, threads, "single-stream", prompt, 48),
                        seed,
                        kinds=kinds,
                    )
                    if model == "reference-11m" and prompt == 256:
                        result = without(result, "skipped", "256 + 48 tokens do not fit 128")
                    cells.append(result)
            for batch in (1, 8, 32):
                cell = Cell(model, variant, 2, "offline", 64, 48, batch=batch)
                cells.append(measured(cell, seed, 3, kinds))
            for rate in (2.0, 4.0):
                cell = Cell(model, variant, 2, "server", 64, 48, concurrency=2, rate=rate)
                cells.append(measured(cell, seed, 3, kinds))
        for threads in (1, 2):
            for prompt in (16, 64, 256):
                missing = Cell(model, "openvino-int4", threads, "single-stream", prompt, 48)
                why = "openvino is not installed (pip install 'edge-slm[peers]')"
                cells.append(CellResult(missing, "openvino", "int4", True, 0, 0, "skipped", why))
    cells[5] = without(cells[5], "failed", "killed at its memory limit: 612 MB, allowed 600 MB")
    cells[14] = disturbed(cells[14])
    for model, variant in itertools.product(SCALES, kinds):
        cells.append(measured(Cell(model, variant, 2, "variations", 64, 48), seed, 3, kinds))
    return Report(
        command="edge-slm bench random-98m reference-11m --peers --html bench.html",
        started="2026-01-31T09:26:53+00:00",
        machine={
            "cpu": "AMD EPYC 9645",
            "board": None,
            "isa": ["avx2", "fma", "avx512f", "avx512_vnni"],
            "cores": 2,
            "usable_cores": 2,
            "governor": None,
            "mhz": 3100,
            "memory_mb": 8100,
            "load": 0.12,
            "system": "Linux 6.1 x86_64",
            "python": "3.11.7",
            "packages": {"edge-slm": "0.1.0", "onnxruntime": "1.31.1", "ctranslate2": "4.8.5"},
        },
        settings={
            "threads": [1, 2],
            "prompt_tokens": [16, 64, 256],
            "new_tokens": [48],
            "scenarios": ["single-stream", "variations", "offline", "server"],
            "rounds": 5,
            "repetitions": 3,
            "target_ms": 500.0,
            "memory_limit_mb": 600.0,
            "energy": "no RAPL or INA3221 counter is readable",
        },
        models={
            "random-98m": {"digest": "9f86d081884c7d65", "path": "runs/random-98m"},
            "reference-11m": {"digest": "60303ae22b998861", "path": "models/reference"},
        },
        cells=tuple(cells),
        quality=tuple(_quality(model, name, kinds) for model in SCALES for name in kinds),
        endurance=tuple(
            _endurance(model, name, kind)
            for model in SCALES
            for name, kind in kinds.items()
            if not kind.peer
        ),
    )


def without(result: CellResult, status: Status, reason: str) -> CellResult:
    """The cell as one that was not measured."""
    return replace(result, status=status, reason=reason, samples=())


def disturbed(result: CellResult, reason: str = "clock down to 71%") -> CellResult:
    """The cell with every process flagged."""
    samples = tuple(replace(s, flags=(reason,)) for s in result.samples)
    return replace(result, status="flagged", reason=reason, samples=samples)


def _quality(model: str, variant: str, kinds: Mapping[str, Kind]) -> Quality:
    kind = kinds[variant]
    random = np.random.default_rng(len(variant))
    asked = random.choice([4, 8, 12, 16, 24, 32, 48, 64], 200)
    got = np.maximum(1, np.round(asked * random.normal(1, 0.08 + kind.kl, 200))).astype(int)
    fidelity = {
        "positions": 9822,
        "top1": kind.top1,
        "top1_error": 0.001,
        "perplexity_ratio": 1 + kind.kl / 2,
        "perplexity_ratio_error": 0.0003,
        "kl_mean": kind.kl,
        "kl_mean_error": kind.kl / 40,
        "kl_999": kind.kl * 30,
        "max_abs_logit_error": 0.2,
    }
    obeyed = {
        "answers": 200,
        "within": float((abs(got - asked) <= np.maximum(2, asked // 10)).mean()),
        "mae": float(abs(got - asked).mean()),
        "spearman": 0.97,
    }
    more = {} if kind.engine == "ctranslate2" else {"prefix cache": 0}
    return Quality(
        model,
        variant,
        kind.peer,
        "transformers-fp32",
        "200 responses, 9822 tokens, digest 0a1b2c3d4e5f",
        None if variant == "transformers-fp32" else fidelity,
        None if kind.peer else obeyed,
        () if kind.peer else tuple((int(a), int(g)) for a, g in zip(asked, got, strict=True)),
        None if kind.peer else {"batch 8": 3 * (kind.precision == "int4"), **more},
    )


def _endurance(model: str, variant: str, kind: Kind) -> Endurance:
    done = [1, *range(20, 1001, 20)]
    full = 70 + kind.rss * SCALES[model]
    grown = full * (0.9 + 0.1 * (1 - np.exp(-np.array(done) / 25)))
    return Endurance(model, variant, 1000, tuple(zip(done, map(float, grown), strict=True)))
