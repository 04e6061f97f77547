"""Small language models that obey commands, on the device.

import edge_slm
slm = edge_slm.load()
print(slm.generate("a red fox in the snow", task="image", words=24).text)
"""

from __future__ import annotations

import os
from pathlib import Path

import edge_slm_runtime
from edge_slm_runtime import SLM, Command, EdgeSlmError, Generation, Request, Stats, Stream
from edge_slm_runtime.memory import PREFIX_CACHE_MB

__all__ = [
    "SLM",
    "Command",
    "EdgeSlmError",
    "Generation",
    "Request",
    "Stats",
    "Stream",
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


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    prefix_cache_mb: float = PREFIX_CACHE_MB,
    speculate: bool = False,
    max_memory_mb: float | None = None,
) -> SLM:
    """`edge_slm_runtime.load`, with the shipped bundle when no path is given."""
    return edge_slm_runtime.load(
        shipped_bundle() if path is None else path,
        engine=engine,
        precision=precision,
        threads=threads,
        verify=verify,
        prefix_cache_mb=prefix_cache_mb,
        speculate=speculate,
        max_memory_mb=max_memory_mb,
    )
