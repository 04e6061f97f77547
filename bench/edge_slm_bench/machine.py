"""What a figure was measured on: without it the figure means nothing."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("edge-slm", "onnxruntime", "ctranslate2", "tokenizers", "numpy")
# Of the instruction sets, those that decide which matrix kernels run.
_TELLING_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512_vnni",
    "avx512f",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """cpu: its name, or the implementer/part codes that ARM gives instead. memory in MB.
    load: runnable processes, mean of the last minute. Both None without psutil."""

    cpu: str
    isa: tuple[str, ...]
    cores: int
    usable_cores: int
    memory_mb: int | None
    load: float | None
    system: str
    python: str
    packages: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def machine() -> Machine:
    info = _fields(Path("/proc/cpuinfo"))
    flags = (info.get("flags") or info.get("Features") or "").split()
    arm = f"{info.get('CPU implementer', '')} {info.get('CPU part', '')}".strip()
    memory, load = _memory_and_load()
    cores = os.cpu_count() or 1
    return Machine(
        cpu=info.get("model name") or arm or platform.processor() or platform.machine(),
        isa=tuple(flag for flag in _TELLING_FLAGS if flag in flags),
        cores=cores,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        memory_mb=memory,
        load=load,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=dict(_versions()),
    )


def _memory_and_load() -> tuple[int | None, float | None]:
    try:
        import psutil
    except ImportError:  # not in the plain install
        return None, None
    return psutil.virtual_memory().total // 1_000_000, psutil.getloadavg()[0]


def _fields(path: Path) -> dict[str, str]:
    """`name : value` lines of a /proc file, the first of each name; empty where there is none."""
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields


def _versions() -> list[tuple[str, str]]:
    found = []
    for package in _PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found
