"""Small language models that obey commands, on the device.

import edge_slm
slm = edge_slm.load()
print(slm.generate("a red fox in the snow", task="image", words=24).text)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import edge_slm_runtime
from edge_slm_runtime import (
    SLM,
    Command,
    EdgeSlmError,
    Generation,
    Request,
    Stats,
    Stream,
    installed_models,
)

__all__ = [
    "SLM",
    "Command",
    "EdgeSlmError",
    "Generation",
    "Request",
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


def load(path: str | os.PathLike[str] | None = None, **options: Any) -> SLM:
    """`edge_slm_runtime.load` with its options. path: of a bundle folder, or the name of an
    installed model; None is the shipped bundle."""
    return edge_slm_runtime.load(shipped_bundle() if path is None else path, **options)
