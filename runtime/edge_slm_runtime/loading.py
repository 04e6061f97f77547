"""From a folder to an SLM: verify, choose a variant, open its engine."""

from __future__ import annotations

import os
from _thread import start_new_thread
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from numbers import Real
from pathlib import Path
from threading import Lock
from time import perf_counter
from types import MappingProxyType

from edge_slm_runtime.bundle import TOKENIZER, WORDS, Manifest, Variant
from edge_slm_runtime.command import is_count
from edge_slm_runtime.cores import default_threads
from edge_slm_runtime.deltas import Delta
from edge_slm_runtime.engines import engine_class
from edge_slm_runtime.engines.base import PREFILL, Engine, EngineOptions
from edge_slm_runtime.engines.choice import importing, open_engine, pick_variants
from edge_slm_runtime.engines.kv_cache import ALIGN
from edge_slm_runtime.errors import (
    BadSetting,
    EngineNotInstalled,
    ManifestInvalid,
    OutOfMemory,
    shown,
)
from edge_slm_runtime.files import reading
from edge_slm_runtime.generate import SLM
from edge_slm_runtime.installed import loading
from edge_slm_runtime.integrity import unchanged, verify_contents, verify_structure
from edge_slm_runtime.memory import (
    PREFIX_CACHE_MB,
    memory_errors,
    memory_estimate,
    refuse_little_room,
)
from edge_slm_runtime.text import TextCodec
from edge_slm_runtime.thread_choice import threads_for

_THREADS_MAX = 1024
_ROWS_MAX = 1 << 16
_NO_MEMORY = "there is no memory to load the bundle", "choose a smaller variant"


@memory_errors(*_NO_MEMORY)
def load(
    path: str | os.PathLike[str],
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    prefix_cache_mb: float = PREFIX_CACHE_MB,
    speculate: bool = False,
    max_memory_mb: float | None = None,
    prefill_tokens: int = PREFILL,
    expected_digest: str | None = None,
    trusted_keys: Sequence[str] = (),
    adapters: Mapping[str, str | os.PathLike[str]] = MappingProxyType({}),
) -> SLM:
    """Verifies a bundle and loads one of its variants.

    path: of the bundle folder, or the name of an installed model (`installed_models`).
    engine: "numba", "onnxruntime", "ctranslate2" or "auto" (the first of them that is installed;
    numba only where its kernels are fast).
    precision: "int8", "int4", "fp32" or "auto" (the first present). threads:
    None is as many as `edge-slm profile` found quickest on this device, or the cores that this
    process may use, at most 8; of these numba leaves all but one idle where it is as quick alone
    (`engines.pace`). verify: names, kinds and sizes of all files and the sha256 sums of those that
    are loaded; `verify` of the package checks every file. verify=False leaves out the sums, which
    read every byte; only for a folder that was verified before and that no other user can write.
    prefix_cache_mb: MiB of keys and values kept for prompts that begin alike
    (not for ctranslate2); 0 keeps none, and the last answer's are kept however long.
    speculate: guess tokens and check several at once, which pays when answers repeat what
    was written before, and decodes a batch one by one (numba only: other engines would round
    otherwise). max_memory_mb: MiB that the process may come to, by
    `memory.memory_estimate` for prompts and answers as long as the model takes; also a
    bound on the batch_size. prefill_tokens: of a prompt, computed at once; fewer take less
    memory and more time (not for ctranslate2). expected_digest: of the bundle's manifest, which
    covers every file. trusted_keys: public keys in hex, one of which the bundle must be signed
    by (needs [sign]); without any, no signature is asked for. adapters: name → file of those that
    requests may choose from, beside the bundle's own (`SLM.add_adapter`; numba only).

    Raises a BundleError (see `integrity.verify`), VariantNotFound,
    EngineNotInstalled, EngineError, BadSetting, OutOfMemory, AdapterInvalid, NotSupportedByEngine.
    """
    started = perf_counter()
    if threads is not None and not (is_count(threads) and 1 <= threads <= _THREADS_MAX):
        raise BadSetting(f"threads is {shown(threads)}", f"allowed: 1 … {_THREADS_MAX}, whole")
    _check_size("prefix_cache_mb", prefix_cache_mb)
    if not is_count(prefill_tokens) or prefill_tokens < ALIGN:
        raise BadSetting(
            f"prefill_tokens is {shown(prefill_tokens)}", f"allowed: {ALIGN} or more, whole"
        )
    if max_memory_mb is not None:
        _check_size("max_memory_mb", max_memory_mb)
    cache = int(prefix_cache_mb * (1 << 20))
    with loading(path) as root:
        manifest = verify_structure(root)
        if expected_digest is not None or trusted_keys:
            from edge_slm_runtime.signatures import check_trust

            check_trust(root, manifest, trusted_keys, expected_digest)
        with unchanged(root, manifest.files):
            verify_contents(root, manifest, [TOKENIZER], hashes=verify)
            variants = pick_variants(manifest, engine, precision)
            for variant, other in zip_longest(variants, variants[1:]):
                most_rows = None
                if max_memory_mb is not None:
                    most_rows = _most_rows(manifest, variant, max_memory_mb, prefix_cache_mb)
                options = EngineOptions(
                    precision=variant.precision,
                    threads=int(threads or threads_for(manifest, variant)),
                    cache_bytes=cache,
                    speculate=speculate,
                    prefill_tokens=int(prefill_tokens),
                    fewer_threads=threads is None,
                )
                try:
                    opened = _open(root, manifest, variant, options, hashes=verify)
                except EngineNotInstalled as error:
                    if other is None:
                        raise
                    _warn(f"{error.problem}; using {other.engine} instead")
                else:
                    break
            deltas = [Delta.read(root / path) for path in manifest.deltas]
    slm = SLM(manifest, variant, *opened, (perf_counter() - started) * 1e3, most_rows, deltas)
    for name, file in adapters.items():
        slm.add_adapter(file, name)
    return slm


@memory_errors(*_NO_MEMORY)
def load_variant(path: Path, manifest: Manifest, variant: Variant) -> SLM:
    """A variant of a bundle that was verified. Raises as `load`."""
    options = EngineOptions(variant.precision, default_threads())
    opened = _open(path, manifest, variant, options, hashes=False)
    return SLM(manifest, variant, *opened, 0.0)


def _open(
    root: Path, manifest: Manifest, variant: Variant, options: EngineOptions, *, hashes: bool
) -> tuple[TextCodec, Engine, list[bytes]]:
    """With the words of its lexicon. Raises as `load`."""
    refuse_little_room(variant, options.threads)
    weights = [path for path in manifest.files_of(variant) if path != TOKENIZER]
    verified = _run_in_background(partial(verify_contents, root, manifest, weights, hashes=hashes))
    engine = engine_class(variant.engine)
    try:  # hashing leaves Python free for it
        with importing(engine):
            engine.preload(manifest.model)
        codec = TextCodec(root / TOKENIZER, manifest.prompt, manifest.model.positions)
    finally:
        verified()
    if codec.size > manifest.model.vocab_size:
        raise ManifestInvalid(
            f"{TOKENIZER} has {codec.size} tokens, the model {manifest.model.vocab_size}"
        )
    lexicon = []
    if WORDS in manifest.files:
        with reading(root / WORDS):
            lexicon = (root / WORDS).read_bytes().split()  # it was checked with the weights
    return codec, open_engine(root / variant.path, manifest, variant, options), lexicon


def _warn(text: str) -> None:
    from logging import getLogger  # takes long to import, and few need it

    getLogger("edge_slm").warning(text)


def _check_size(name: str, value: object) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):  # type: ignore[operator]
        raise BadSetting(f"{name} is {shown(value)}", "allowed: 0 or more MiB")


def _most_rows(
    manifest: Manifest, variant: Variant, limit: float, prefix_cache_mb: float
) -> int | None:
    """How many answers fit into `limit` MiB at a time; None when it is no matter of memory.

    Raises OutOfMemory when not one does, with the variants of which one would.
    """

    def need(rows: int) -> float:
        return memory_estimate(manifest, variant, rows, prefix_cache_mb=prefix_cache_mb)

    rows = bisect_right(range(1, _ROWS_MAX + 1), limit, key=need)
    if not rows:
        least = sorted(
            (memory_estimate(manifest, v), f"{v.engine} {v.precision}") for v in manifest.variants
        )
        fitting = [one for one in least if one[0] <= limit]
        told = ", ".join(f"{name} ({mb:.0f} MiB)" for mb, name in fitting or least[:1])
        raise OutOfMemory(
            f"{variant.engine} {variant.precision} needs up to {need(1):.0f} MiB of memory, "
            f"more than the {limit:g} allowed",
            f"without a prefix cache this fits: {told}"
            if fitting
            else f"the least that this bundle needs is {told}, without a prefix cache",
        )
    return rows if engine_class(variant.engine).batches else None


def _run_in_background(work: Callable[[], None]) -> Callable[[], None]:
    """Starts `work` in a thread; returns a function that waits for its end and raises its
    error. (`concurrent.futures` takes longer to import than the thread saves.)

    A thread may end for want of memory before it begins, and `Thread.start` would wait for it
    for ever: what was not begun is done by the caller.
    """
    errors: list[BaseException] = []
    begun, ended = Lock(), Lock()
    ended.acquire()

    def run() -> None:
        if begun.acquire(blocking=False):
            try:
                work()
            except BaseException as error:
                errors.append(error)
            finally:
                ended.release()

    def wait() -> None:
        run()
        ended.acquire()
        for error in errors:
            raise error

    with suppress(RuntimeError):  # no thread to be had
        start_new_thread(run, ())
    return wait
