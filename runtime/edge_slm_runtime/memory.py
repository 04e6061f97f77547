"""Peak memory of a process: measured, and by formula before anything is loaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from edge_slm_runtime.bundle import Manifest, Variant

PREFIX_CACHE_MB = 16.0  # of keys and values kept for prompts that begin alike, by default
PREFILL = 256  # positions of a prompt that are computed at once, to bound what they take

# MiB of a process with the engine and no model in it, code that runs included
# (CPython 3.11, Linux, x86-64, onnxruntime 1.31, ctranslate2 4.8).
_PROCESS_MB = {"onnxruntime": 72.0, "ctranslate2": 70.0}
_MB = 1 << 20
_FLOAT = 4  # bytes


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
    by several different prompts.

    The sum of the process with its engine, the weights, the keys and values (2 × layers ×
    positions × width floats a row) and what computing a prompt takes. Within 10% or 10 MiB
    of what is measured on Linux x86-64.
    """
    model = manifest.model
    tokens = model.positions if positions is None else min(positions, model.positions)
    cache = rows * 2 * model.layers * tokens * model.width * _FLOAT
    at_once = min(tokens, PREFILL)
    # Activations (the arena holds some of the feed-forward at a time), attention scores, logits.
    work = at_once * 24 * model.width + model.heads * at_once * tokens + 2 * rows * model.vocab_size
    total = _weights(manifest, variant) + cache + work * _FLOAT
    return _PROCESS_MB[variant.engine] + total / _MB + prefix_cache_mb


def _weights(manifest: Manifest, variant: Variant) -> float:
    """Bytes of weights that are in memory.

    onnxruntime copies every matrix into the layout of its kernels and lets the file go. It
    keeps the file's pages of the embedding, which is the LM head's matrix once more, and of
    the scales of 4-bit blocks, which it copies twice.
    """
    if variant.engine == "ctranslate2":
        return variant.bytes
    model = manifest.model
    element = _FLOAT if variant.precision == "fp32" else 1
    table = model.vocab_size * model.width * element
    scales = 0.0
    if variant.precision == "int4":
        # GPT-2 has 12 × width² weights a layer, half a byte each; the rest are scales.
        scales = variant.weight_bytes_per_token - table - 6 * model.layers * model.width**2
    positions = model.positions * model.width * _FLOAT
    return variant.weight_bytes_per_token + table + 2 * scales + positions
