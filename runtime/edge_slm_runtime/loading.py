"""From a folder to an SLM: verify, choose a variant, open its engine."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import perf_counter

from edge_slm_runtime.bundle import TOKENIZER, Manifest, Variant
from edge_slm_runtime.command import is_count
from edge_slm_runtime.cores import default_threads
from edge_slm_runtime.engines import open_engine, pick_variant
from edge_slm_runtime.errors import BadSetting, ManifestInvalid, OutOfMemory, shown
from edge_slm_runtime.generate import SLM
from edge_slm_runtime.integrity import verify_contents, verify_structure
from edge_slm_runtime.memory import PREFIX_CACHE_MB, memory_estimate
from edge_slm_runtime.text import TextCodec

_THREADS_MAX = 1024


def load(
    path: str | os.PathLike[str],
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    prefix_cache_mb: float = PREFIX_CACHE_MB,
    speculate: bool = False,
    max_memory_mb: float | None = None,
) -> SLM:
    """Verifies a bundle and loads one of its variants.

    engine: "onnxruntime", "ctranslate2" or "auto" (the first installed).
    precision: "int8", "int4", "fp32" or "auto" (the first present). threads:
    None is the cores that this process may use, at most 8. verify: names, kinds and
    sizes of all files and the sha256 sums of those that are loaded; `verify` of the
    package checks every file. verify=False leaves out the sums, which read every byte;
    only for a folder that was verified before and that nobody else can write.
    prefix_cache_mb: MiB of keys and values kept for prompts that begin alike
    (onnxruntime only); 0 keeps none. speculate: guess tokens and
    check several at once, which is faster for single answers but decodes a batch one by one
    (onnxruntime only, and bundles that have the graph for it). max_memory_mb: MiB that the
    process may come to, by `memory_estimate`; also a bound on the batch_size.

    Raises a BundleError (see `integrity.verify`), VariantNotFound,
    EngineNotInstalled, EngineError, BadSetting, OutOfMemory.
    """
    started = perf_counter()
    if threads is not None and not (is_count(threads) and 1 <= threads <= _THREADS_MAX):
        raise BadSetting(f"threads is {shown(threads)}", f"allowed: 1 … {_THREADS_MAX}, whole")
    _check_size("prefix_cache_mb", prefix_cache_mb)
    root = Path(path)
    manifest = verify_structure(root)
    variant = pick_variant(manifest, engine, precision)
    most_rows = None
    if max_memory_mb is not None:
        _check_size("max_memory_mb", max_memory_mb)
        most_rows = _most_rows(manifest, variant, max_memory_mb, prefix_cache_mb)
    ahead = Thread(target=_import, args=(variant.engine,), daemon=True)
    ahead.start()  # hashing leaves Python free for it
    verify_contents(root, manifest, manifest.files_of(variant), hashes=verify)
    codec = TextCodec(root / TOKENIZER, manifest.command)
    if codec.size > manifest.model.vocab_size:
        raise ManifestInvalid(
            f"{TOKENIZER} has {codec.size} tokens, the model {manifest.model.vocab_size}"
        )
    ahead.join()
    loaded = open_engine(
        root / variant.path,
        manifest,
        variant,
        threads or default_threads(),
        int(prefix_cache_mb * (1 << 20)),
        speculate,
    )
    return SLM(manifest, variant, codec, loaded, (perf_counter() - started) * 1e3, most_rows)


def _check_size(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):  # type: ignore[operator]
        raise BadSetting(f"{name} is {shown(value)}", "allowed: 0 or more MiB")


def _most_rows(
    manifest: Manifest, variant: Variant, limit: float, prefix_cache_mb: float
) -> int | None:
    """How many answers fit into `limit` MiB at a time; None when it is no matter of memory.

    Raises OutOfMemory when not one does, with the variants of which one would.
    """
    need = memory_estimate(manifest, variant, prefix_cache_mb=prefix_cache_mb)
    if need > limit:
        least = {v: memory_estimate(manifest, v) for v in manifest.variants}
        fitting = [f"{v.engine} {v.precision} ({mb:.0f})" for v, mb in least.items() if mb <= limit]
        smaller = f", or {', '.join(fitting)} without a prefix cache" if fitting else ""
        raise OutOfMemory(
            f"{variant.engine} {variant.precision} needs up to {need:.0f} MiB of memory, "
            f"more than the {limit:g} allowed",
            f"allow as much{smaller}",
        )
    row = memory_estimate(manifest, variant, rows=2, prefix_cache_mb=prefix_cache_mb) - need
    return 1 + int((limit - need) / row) if variant.engine == "onnxruntime" else None


def _import(engine: str) -> None:
    with suppress(Exception):  # the engine's own import raises it again
        importlib.import_module(engine)
