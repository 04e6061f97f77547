"""Peak memory of a process: measured, and by formula before anything is loaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from edge_slm_runtime.bundle import Manifest, Variant

PREFIX_CACHE_MB = 16.0  # of keys and values kept for prompts that begin alike, by default
PREFILL = 256  # positions of a prompt that are computed at once, to bound what they take

# MiB of a process with the engine and no model in it, code that runs included, and how many
# bytes of memory a byte of weights takes once the kernels have packed it: a block's scale is
# there thrice, in the file, packed, and times the sum of its weights. Fitted on Linux x86-64
# with CPython 3.11, onnxruntime 1.31 and ctranslate2 4.8 to models of 11M and 98M parameters.
_PROCESS_MB = {"onnxruntime": 67.0, "ctranslate2": 70.0, "numba": 48.0}
_RESIDENT = {
    ("onnxruntime", "fp32"): 1.0,
    ("onnxruntime", "int8"): 1.12,
    ("onnxruntime", "int4"): 1.18,
    ("ctranslate2", "fp32"): 1.0,
    ("ctranslate2", "int8"): 1.0,
    ("numba", "int8"): 1.0,
    ("numba", "int4"): 1.0,
}
_MB = 1 << 20
_FLOAT = 4  # bytes
_CACHE_BYTES = {"numba": 2}  # of a key or value; others keep floats


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


def memory_estimate(
    manifest: Manifest,
    variant: Variant,
    rows: int = 1,
    positions: int | None = None,
    prefix_cache_mb: float = 0.0,
) -> float:
    """Peak resident memory in MiB of a process that does nothing but run `variant`.

    rows: answers written together. positions: tokens of the longest prompt and its answer;
    None is all that the model has. prefix_cache_mb: as given to `load`; it is used up only
    by several different prompts, and ctranslate2 has none.

    The sum of the process with its engine, the weights, the keys and values (2 × layers ×
    positions × width a row, floats or halves) and what computing a prompt takes; or, if that
    is more, the embedding table, which is in memory twice while it is loaded. Within 10%
    or 10 MiB of what is measured on Linux x86-64.
    """
    model = manifest.model
    weights = variant.weight_bytes_per_token * _RESIDENT[variant.engine, variant.precision]
    tokens = model.positions if positions is None else min(positions, model.positions)
    number = _CACHE_BYTES.get(variant.engine, _FLOAT)
    cache = rows * 2 * model.layers * tokens * model.width * number
    at_once = min(tokens, PREFILL)
    work = 2 * rows * model.vocab_size  # logits, and what a sampler makes of them
    if variant.engine == "numba":  # activations as floats and as bytes
        work += at_once * 7 * model.width
    else:  # the arena holds some of the feed-forward's at a time; attention scores
        work += at_once * 24 * model.width + model.heads * at_once * tokens
    used = (cache + work * _FLOAT) / _MB
    if variant.engine != "ctranslate2":
        used += prefix_cache_mb
    table = model.vocab_size * model.width * (_FLOAT if variant.precision == "fp32" else 1)
    if variant.engine == "numba":
        table = 0  # read into its place
    return _PROCESS_MB[variant.engine] + weights / _MB + max(used, table / _MB)
