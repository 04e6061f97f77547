"""Memory and latency of one variant, each measurement in a fresh process.

A process of its own gives an honest load time and an honest peak memory (VmHWM
belongs to the process image; the imports of whoever asks do not count). Every
sample is kept; tables show medians.

- load: `edge_slm_runtime.load`, engine import and digest check included.
- TTFT: submit to first token, tokenising included, per prompt length.
- TPOT: (latency - TTFT) / (new tokens - 1), after the shortest prompt.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from edge_slm_runtime import errors
from edge_slm_runtime.bundle import Variant, read_manifest

PROMPT_TOKENS = (16, 64, 256)
NEW_TOKENS = 48
SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Measurement:
    """All samples of one cell (bundle × variant × threads).

    ttft_ms: prompt tokens → samples in ms. load_ms and peak_rss_mb have one sample
    per process, the others one per generation. generations: `Generation.as_dict()`
    of each request that was given.
    """

    bundle: str
    variant: str
    engine: str
    precision: str
    threads: int
    disk_bytes: int
    load_ms: tuple[float, ...]
    ttft_ms: dict[int, tuple[float, ...]]
    tpot_ms: tuple[float, ...]
    peak_rss_mb: tuple[float, ...]
    generations: tuple[dict[str, Any], ...] = ()

    def with_samples_of(self, other: Measurement) -> Measurement:
        """The same cell, measured once more in another process."""
        return replace(
            self,
            load_ms=self.load_ms + other.load_ms,
            ttft_ms={n: self.ttft_ms[n] + other.ttft_ms[n] for n in self.ttft_ms},
            tpot_ms=self.tpot_ms + other.tpot_ms,
            peak_rss_mb=self.peak_rss_mb + other.peak_rss_mb,
        )

    def medians(self) -> dict[str, Any]:
        tpot = median(self.tpot_ms)
        return {
            "load_ms": median(self.load_ms),
            "ttft_ms": {n: median(samples) for n, samples in self.ttft_ms.items()},
            "tpot_ms": tpot,
            "tokens_per_second": 1000 / tpot,
            "peak_rss_mb": median(self.peak_rss_mb),
        }

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "medians": self.medians()}


def measure_variant(
    bundle: str | Path,
    variant: str,
    *,
    threads: int | None = None,
    prompt_tokens: Sequence[int] = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    samples: int = SAMPLES,
    requests: Sequence[Mapping[str, Any]] = (),
) -> Measurement:
    """Measures `variant` of `bundle` in a fresh process.

    prompt_tokens: lengths to time, those that leave room for `new_tokens` in the
    context. samples: per prompt length, after one warm-up. requests: arguments of
    `SLM.generate`, run afterwards for their texts.

    Raises VariantNotFound, and what `load` and `generate` raise.
    """
    manifest = read_manifest(bundle)
    chosen = next((v for v in manifest.variants if v.name == variant), None)
    if chosen is None:
        raise errors.VariantNotFound(
            f"{bundle} has no variant {variant!r}",
            f"it has {', '.join(v.name for v in manifest.variants)}",
        )
    room = manifest.model.positions - new_tokens
    job = {
        "bundle": str(bundle),
        "engine": chosen.engine,
        "precision": chosen.precision,
        "threads": threads,
        "prompt_tokens": [n for n in prompt_tokens if n <= room],
        "new_tokens": new_tokens,
        "samples": samples,
        "requests": list(requests),
    }
    return _measurement(str(bundle), chosen, _in_fresh_process(job))


def _measurement(bundle: str, variant: Variant, result: dict[str, Any]) -> Measurement:
    return Measurement(
        bundle=bundle,
        variant=variant.name,
        engine=variant.engine,
        precision=variant.precision,
        threads=result["threads"],
        disk_bytes=variant.bytes,
        load_ms=(result["load_ms"],),
        ttft_ms={int(n): tuple(samples) for n, samples in result["ttft_ms"].items()},
        tpot_ms=tuple(result["tpot_ms"]),
        peak_rss_mb=(result["peak_rss_mb"],),
        generations=tuple(result["generations"]),
    )


def _in_fresh_process(job: dict[str, Any]) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "edge_slm_bench.cell"],
        input=json.dumps(job),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise errors.EngineError(
            f"measuring {job['engine']} {job['precision']} ended with "
            f"status {process.returncode}: {last}"
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        name, problem, hint = answer["error"]
        raise getattr(errors, name)(problem, hint)
    return answer


def request_of(tokens: int, count: Callable[[str], int]) -> str:
    """A request that `count` (text → prompt tokens) puts at `tokens`, or as close below.

    The text is plain words; letters fill up what no word fits into.
    """
    words = ("a", "cosy", "cabin", "in", "the", "snow", "at", "night")
    text = "a"
    for word in chain(*([words] * tokens)):
        if count(f"{text} {word}") > tokens:
            break
        text = f"{text} {word}"
    for filler in chain(*([(" a", "x", "q", " of")] * tokens)):
        if count(text) >= tokens:
            break
        if count(text + filler) <= tokens:
            text += filler
    return text
