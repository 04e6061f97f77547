"""Small language models that obey commands, on the device.

import edge_slm
slm = edge_slm.load()
print(slm.generate("a red fox in the snow", task="image", words=24).text)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import edge_slm_runtime
from edge_slm_runtime import (
    SLM,
    Command,
    EdgeSlmError,
    Generation,
    Request,
    Session,
    SessionStream,
    Stats,
    Stream,
    installed_models,
)

if TYPE_CHECKING:
    from edge_slm_runtime.isolated import IsolatedSLM

__all__ = [
    "SLM",
    "Command",
    "EdgeSlmError",
    "Generation",
    "Request",
    "Session",
    "SessionStream",
    "Stats",
    "Stream",
    "installed_models",
    "load",
    "shipped_bundle",
]
__version__: str


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version  # a fifth of the whole import, for what few ask

    return version("edge-slm")


def shipped_bundle() -> Path:
    """The small bundle that comes with the package."""
    return Path(__file__).parent / "data" / "reference-bundle"


@overload
def load(
    path: str | os.PathLike[str] | None = None, *, isolate: Literal[True], **options: Any
) -> IsolatedSLM: ...


@overload
def load(
    path: str | os.PathLike[str] | None = None, *, isolate: Literal[False] = False, **options: Any
) -> SLM: ...


def load(
    path: str | os.PathLike[str] | None = None, *, isolate: bool = False, **options: Any
) -> SLM | IsolatedSLM:
    """`edge_slm_runtime.load` with its options. path: of a bundle folder, or the name of an
    installed model; None is the shipped bundle. isolate: in a process of its own, whose crash
    is an EngineError and a restart."""
    bundle = shipped_bundle() if path is None else path
    if not isolate:
        return edge_slm_runtime.load(bundle, **options)
    from edge_slm_runtime.isolated import IsolatedSLM

    return IsolatedSLM(bundle, **options)
