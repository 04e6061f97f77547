"""How many threads a variant takes by default: as many as it was quickest with when `edge-slm
profile` measured it on this device, else the cores."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.cores import default_threads, processor
from edge_slm_runtime.files import cache_folder, write_aside


def threads_for(manifest: Manifest, variant: Variant) -> int:
    """Never more than the cores that this process may use now."""
    most = default_threads()
    with suppress(OSError, ValueError):  # never measured, or damaged
        content = _file(manifest, variant, most).read_bytes()[:9]
        return max(1, min(int(content), most))
    return most


def remember_threads(manifest: Manifest, variant: Variant, threads: int) -> None:
    """Raises OSError where this user has no cache."""
    file = _file(manifest, variant, default_threads())
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # where compiled code lies too
    with write_aside(file) as aside:
        aside.write_text(f"{threads}\n", "utf-8")


def _file(manifest: Manifest, variant: Variant, most: int) -> Path:
    parts = (manifest.digest, variant.name, processor(), str(most))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return cache_folder() / f"{key}.threads"
