"""Peak memory of a process: measured, and by formula before anything is loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edge_slm_runtime.address_space import room_mb
from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.engines import engine_class
from edge_slm_runtime.engines.base import PREFILL
from edge_slm_runtime.errors import OutOfMemory

PREFIX_CACHE_MB = 16.0  # of keys and values kept for prompts that begin alike, by default
_LOADING_MB = 16  # of address space
_MB = 1 << 20
_FLOAT = 4  # bytes


@contextmanager
def memory_errors(problem: str, hint: str) -> Iterator[None]:
    """Python's MemoryError as OutOfMemory."""
    try:
        yield
    except MemoryError:
        raise OutOfMemory(problem, hint) from None


def peak_rss_mb() -> float:
    """Peak resident memory in MiB: VmHWM where there is a /proc, else getrusage."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
        if match:
            return int(match[1]) / 1024
    except (OSError, UnicodeDecodeError):
        pass
    try:
        import resource
    except ImportError:  # Windows has neither
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def refuse_little_room(variant: Variant, threads: int) -> None:
    """Where the address space is limited (`ulimit -v`): without room to load `variant`, engines
    and the C library hang or end the process. Raises OutOfMemory."""
    room = room_mb()
    needed = (threads + 1) * engine_class(variant.engine).thread_room_mb
    needed += _LOADING_MB + 2 * variant.bytes // _MB
    if room < needed:
        raise OutOfMemory(
            f"the limit leaves {room:.0f} MiB of address space, {variant.name} needs {needed}",
            "raise it (ulimit -v), or choose fewer threads",
        )


def memory_estimate(
    manifest: Manifest,
    variant: Variant,
    rows: int = 1,
    positions: int | None = None,
    prefix_cache_mb: float = 0.0,
) -> float:
    """Peak resident memory in MiB of a process that does nothing but run `variant`.

    rows: answers written together. positions: tokens of the longest prompt and its answer;
    None is all that the model has. prefix_cache_mb: as given to `load`; several different
    prompts fill it.

    The sum of the process with its engine, the weights, the keys and values (2 × layers ×
    positions × width of the key-value heads a row, floats or halves) and what computing a prompt
    takes; or, if that is more, the embedding table, which is in memory twice while it is
    loaded. Within 10%
    or 10 MiB of what is measured on Linux x86-64.
    """
    model, engine = manifest.model, engine_class(variant.engine)
    weights = variant.weight_bytes_per_token * engine.resident[variant.precision]
    tokens = model.positions if positions is None else min(positions, model.positions)
    cached = (
        rows * 2 * model.layers * tokens * model.kv_width * np.dtype(engine.cache_dtype).itemsize
    )
    # Logits, and a copy for the sampler.
    work = 2 * rows * model.vocab_size
    work += engine.work_floats(model, rows, min(tokens, PREFILL), tokens)
    used = (cached + work * _FLOAT) / _MB
    if engine.prefix_cache:
        used += prefix_cache_mb
    table = model.vocab_size * model.width * (_FLOAT if variant.precision == "fp32" else 1)
    if not engine.loads_table_twice:
        table = 0
    mb: float = engine.process_mb + weights / _MB + max(used, table / _MB)
    return mb
