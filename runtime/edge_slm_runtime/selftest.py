"""Runs a bundle's golden requests on this device, each variant in a process of its own.

A process of its own, because a damaged model or a native library that does not suit the
processor may end the process that loads it.

    python -m edge_slm_runtime.selftest FOLDER VARIANT      prints a `VariantTest` as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from edge_slm_runtime.bundle import Golden, Manifest, Variant
from edge_slm_runtime.errors import EngineNotInstalled, SelfTestFailed
from edge_slm_runtime.generate import SLM
from edge_slm_runtime.integrity import verify_structure
from edge_slm_runtime.isolated import interpreter
from edge_slm_runtime.memory import peak_rss_mb

TIMEOUT = 300.0  # seconds; the numba engine compiles in its first process
_NOT_INSTALLED = 77  # exit status


@dataclass(frozen=True, slots=True)
class VariantTest:
    """What a variant did. goldens: how many it has; matched: how many gave the stored token ids;
    peak_rss_mb: MiB of the whole process."""

    variant: str
    goldens: int
    matched: int
    ms_per_token: float
    peak_rss_mb: float

    @property
    def passed(self) -> bool:
        """Whether at least half of the goldens matched: another processor or engine version may
        rightly differ in a few, by rounding; a damaged model differs in all."""
        return 2 * self.matched >= self.goldens


def self_test(
    folder: Path,
    manifest: Manifest,
    *,
    max_ms_per_token: float | None = None,
    max_memory_mb: float | None = None,
) -> list[VariantTest]:
    """The result of every variant whose engine is installed.

    max_ms_per_token: of the greedy goldens, one request at a time. max_memory_mb: MiB of the
    process. Raises SelfTestFailed when no variant can run here, or one of them crashes,
    hangs, fails (with what its process said), gives other tokens or exceeds a bound.
    """
    tests = [test for v in manifest.variants if (test := _in_process(folder, v)) is not None]
    if not tests:
        names = ", ".join(variant.name for variant in manifest.variants)
        raise SelfTestFailed(f"none of {names} can run here", "install one of their engines")
    for test in tests:
        _judge(test, max_ms_per_token, max_memory_mb)
    return tests


def run_goldens(folder: Path, manifest: Manifest, variant: Variant) -> VariantTest:
    """The goldens of one variant, in this process. Raises what `load` raises."""
    from edge_slm_runtime.loading import load_variant

    count, tokens, matched = 0, 0, 0
    with load_variant(folder, manifest, variant) as slm:
        started = perf_counter()
        for golden, got in golden_answers(slm):
            count += 1
            tokens += len(got)
            matched += got == golden.ids[variant.name]
        seconds = perf_counter() - started
    ms = 1e3 * seconds / max(1, tokens)
    return VariantTest(variant.name, count, matched, ms, peak_rss_mb())


def golden_answers(slm: SLM) -> Iterator[tuple[Golden, tuple[int, ...]]]:
    """Each golden of the loaded variant, and the token ids that it gives now."""
    for golden in slm.manifest.goldens:
        if slm.variant.name in golden.ids:
            yield golden, slm.greedy_ids(golden.request, golden.command, golden.max_new_tokens)


def _judge(test: VariantTest, max_ms: float | None, max_mb: float | None) -> None:
    name = test.variant
    if not test.passed:
        raise SelfTestFailed(
            f"{name} gives other tokens for {test.goldens - test.matched} of {test.goldens} goldens"
        )
    if max_ms is not None and test.ms_per_token > max_ms:
        raise SelfTestFailed(f"{name} takes {test.ms_per_token:.2f} ms a token, not {max_ms:g}")
    if max_mb is not None and test.peak_rss_mb > max_mb:
        raise SelfTestFailed(f"{name} takes {test.peak_rss_mb:.0f} MiB, not {max_mb:g}")


def _in_process(folder: Path, variant: Variant) -> VariantTest | None:
    """None when the engine is not installed. Raises SelfTestFailed, EngineError."""
    executable, environment = interpreter()
    command = [executable, "-m", __name__, str(folder), variant.name]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise SelfTestFailed(f"{variant.name} did not end in {TIMEOUT:g} s") from None
    if done.returncode == _NOT_INSTALLED:
        return None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"its process ended with {done.returncode}"
        raise SelfTestFailed(f"{variant.name} cannot run here: {why}")
    return VariantTest(**json.loads(done.stdout))


def _main(arguments: Sequence[str]) -> int:
    folder, name = Path(arguments[0]), arguments[1]
    manifest = verify_structure(folder)
    (variant,) = (variant for variant in manifest.variants if variant.name == name)
    try:
        test = run_goldens(folder, manifest, variant)
    except EngineNotInstalled:
        return _NOT_INSTALLED
    print(json.dumps(asdict(test)))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
