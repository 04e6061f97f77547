"""Engines: token sources behind one protocol, imported only when they are used."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.engines.base import Engine, first_line
from edge_slm_runtime.errors import BadSetting, EngineNotInstalled, VariantNotFound

ENGINES = ("numba", "onnxruntime", "ctranslate2")  # in the order that "auto" tries them
PRECISIONS = ("int8", "int4", "fp32")  # likewise

_INSTALL = {
    "numba": "pip install 'edge-slm[numba]'",
    "onnxruntime": "pip install edge-slm",
    "ctranslate2": "pip install 'edge-slm[ctranslate2]'",
}


def pick_variant(manifest: Manifest, engine: str, precision: str) -> Variant:
    """The variant that the caller means; "auto" takes the first installed and present, and
    numba last on a processor that its kernels are slow on.

    Raises BadSetting, VariantNotFound, EngineNotInstalled.
    """
    engines = _choices("engine", engine, ENGINES)
    precisions = _choices("precision", precision, PRECISIONS)
    fitting = sorted(
        (v for v in manifest.variants if v.engine in engines and v.precision in precisions),
        key=lambda v: (not _is_fast(v), engines.index(v.engine), precisions.index(v.precision)),
    )
    if not fitting:
        has = ", ".join(f"{v.engine} {v.precision}" for v in manifest.variants) or "none"
        raise VariantNotFound(
            f"{manifest.name} has no variant for engine {engine}, precision {precision}",
            f"it has: {has}",
        )
    for variant in fitting:
        if importlib.util.find_spec(variant.engine):
            return variant
    missing = fitting[0].engine
    raise EngineNotInstalled(f"{missing} is not installed", _INSTALL[missing])


def open_engine(
    folder: Path,
    manifest: Manifest,
    variant: Variant,
    threads: int,
    kept_bytes: int = 0,
    speculate: bool = False,
) -> Engine:
    """Loads a variant from its folder. kept_bytes, speculate: see `SteppingEngine`.

    Raises EngineError when the engine refuses it, ManifestInvalid when it is not
    the model of the manifest, EngineNotInstalled when the package is broken.
    """
    try:
        if variant.engine == "onnxruntime":
            from edge_slm_runtime.engines.onnx import OnnxEngine

            return OnnxEngine(folder, manifest.model, threads, kept_bytes)
        if variant.engine == "numba":
            from edge_slm_runtime.engines.jit import JitEngine

            return JitEngine(folder, manifest.model, threads, kept_bytes, speculate)
        from edge_slm_runtime.engines.ct2 import CTranslate2Engine

        return CTranslate2Engine(folder, manifest.model, variant.precision, threads)
    except ImportError as error:  # found, but a library of its own is missing
        raise EngineNotInstalled(
            f"{variant.engine} cannot be imported: {first_line(error)}", _INSTALL[variant.engine]
        ) from None


def preload(engine: str) -> None:
    """Imports what `open_engine` will need, so that it can happen beside other work.

    Raises ImportError.
    """
    if engine == "numba":
        from edge_slm_runtime.kernels.compiled import kernels

        kernels()
    else:
        importlib.import_module(engine)


def _is_fast(variant: Variant) -> bool:
    if variant.engine != "numba":
        return True
    from edge_slm_runtime.kernels.compiled import has_vnni

    return has_vnni()


def _choices(what: str, asked: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if asked == "auto":
        return known
    if asked not in known:
        raise BadSetting(f"{what} is {asked!r}", f"allowed: auto, {', '.join(known)}")
    return (asked,)
