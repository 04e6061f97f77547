"""Which variant of a bundle is meant, and opening it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.engines import ENGINES, PRECISIONS, engine_class
from edge_slm_runtime.engines.base import Engine, EngineOptions, first_line
from edge_slm_runtime.errors import BadSetting, EngineNotInstalled, VariantNotFound


def pick_variants(manifest: Manifest, engine: str, precision: str) -> list[Variant]:
    """The variant that the caller means, and those to fall back to, each of another engine;
    "auto" takes the first that is installed and present, engines that are slow on this
    processor last.

    Raises BadSetting, VariantNotFound, EngineNotInstalled.
    """
    engines = _choices("engine", engine, ENGINES)
    precisions = _choices("precision", precision, PRECISIONS)

    def order(variant: Variant) -> tuple[bool, int, int]:
        fast = engine_class(variant.engine).fast_here()
        return not fast, engines.index(variant.engine), precisions.index(variant.precision)

    fitting = sorted(
        (v for v in manifest.variants if v.engine in engines and v.precision in precisions),
        key=order,
    )
    if not fitting:
        has = ", ".join(f"{v.engine} {v.precision}" for v in manifest.variants) or "none"
        raise VariantNotFound(
            f"{manifest.name} has no variant for engine {engine}, precision {precision}",
            f"it has: {has}",
        )
    best = {v.engine: v for v in reversed(fitting) if engine_class(v.engine).installed()}
    if not best:
        missing = engine_class(fitting[0].engine)
        raise EngineNotInstalled(f"{missing.name} is not installed", missing.install)
    return sorted(best.values(), key=order)


def open_engine(
    folder: Path, manifest: Manifest, variant: Variant, options: EngineOptions
) -> Engine:
    """Loads `variant` from its `folder`.

    Raises EngineError when the engine refuses it, ManifestInvalid when it is not
    the model of the manifest, EngineNotInstalled when the package is broken.
    """
    with importing(engine := engine_class(variant.engine)):
        return engine(folder, manifest.model, options)


@contextmanager
def importing(engine: type[Engine]) -> Iterator[None]:
    """Raises EngineNotInstalled for an engine whose package is found but cannot be used here,
    since a library of its own or an instruction of the processor is missing."""
    try:
        yield
    except ImportError as error:
        raise EngineNotInstalled(
            f"{engine.name} cannot be used: {first_line(error)}", engine.install
        ) from None


def _choices(what: str, asked: str, known: Collection[str]) -> tuple[str, ...]:
    if asked == "auto":
        return tuple(known)
    if asked not in known:
        raise BadSetting(f"{what} is {asked!r}", f"allowed: auto, {', '.join(known)}")
    return (asked,)
