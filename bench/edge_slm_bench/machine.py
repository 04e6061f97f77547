"""The machine that figures were measured on: without it they mean nothing.

Read from /proc and /sys, so where these are missing (macOS, Windows) little is known.
Unknown facts are None, never 0.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edge_slm_bench.sysfs import fields, number, text
from edge_slm_runtime.cores import control_groups, cpu_quota

_ROOT = Path("/")
_PACKAGES = (
    "edge-slm",
    "onnxruntime",
    "ctranslate2",
    "tokenizers",
    "numpy",
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "openvino",
    "llama-cpp-python",
    "nncf",
    "gguf",
)
# Of the instruction sets, those that decide which matrix kernels run.
_TELLING_FLAGS = tuple(
    "avx2 fma f16c avx_vnni avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16 "
    "neon asimd asimdhp asimddp i8mm bf16 sve sve2 svei8mm sme".split()
)
# MAIN ID register: implementer and part (Arm's reference manuals; Linux's cputype.h).
_ARM_CORES = {
    "0x41 0xc07": "Cortex-A7",
    "0x41 0xd03": "Cortex-A53",
    "0x41 0xd04": "Cortex-A35",
    "0x41 0xd05": "Cortex-A55",
    "0x41 0xd07": "Cortex-A57",
    "0x41 0xd08": "Cortex-A72",
    "0x41 0xd09": "Cortex-A73",
    "0x41 0xd0a": "Cortex-A75",
    "0x41 0xd0b": "Cortex-A76",
    "0x41 0xd0c": "Neoverse-N1",
    "0x41 0xd0d": "Cortex-A77",
    "0x41 0xd0e": "Cortex-A76AE",
    "0x41 0xd40": "Neoverse-V1",
    "0x41 0xd41": "Cortex-A78",
    "0x41 0xd42": "Cortex-A78AE",
    "0x41 0xd44": "Cortex-X1",
    "0x41 0xd46": "Cortex-A510",
    "0x41 0xd47": "Cortex-A710",
    "0x41 0xd48": "Cortex-X2",
    "0x41 0xd49": "Neoverse-N2",
    "0x41 0xd4b": "Cortex-A78C",
    "0x41 0xd4d": "Cortex-A715",
    "0x41 0xd4e": "Cortex-X3",
    "0x41 0xd4f": "Neoverse-V2",
    "0x48 0xd01": "Kunpeng-920",
    "0x4e 0x003": "Denver 2",
    "0x4e 0x004": "Carmel",
    "0x51 0x802": "Kryo-3XX-Gold",
    "0x51 0x804": "Kryo-4XX-Gold",
    "0x61 0x022": "Icestorm-M1",
    "0x61 0x023": "Firestorm-M1",
    "0xc0 0xac3": "Ampere-1",
    "0xc0 0xac4": "Ampere-1a",
}


@dataclass(frozen=True, slots=True)
class Machine:
    """cpu: its name; several kinds of cores are counted. board: of a device tree.
    cores: online. usable_cores: those this process may run on. cpu_quota: how many cores'
    time its control group may use, memory_limit_mb how much memory; None without a limit.
    MHz: of the fastest core now, and the governor's bounds over all cores. Caches in KiB,
    of the first core. Memory in MiB. load: runnable processes, mean of the last minute.
    """

    cpu: str
    board: str | None
    isa: tuple[str, ...]
    cores: int
    usable_cores: int
    cpu_quota: float | None
    governor: str | None
    mhz: int | None
    min_mhz: int | None
    max_mhz: int | None
    l2_kb: int | None
    l3_kb: int | None
    memory_mb: int | None
    available_mb: int | None
    memory_limit_mb: int | None
    swap_used_mb: int | None
    load: float | None
    system: str
    python: str
    packages: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def machine(root: Path = _ROOT) -> Machine:
    """The machine whose /proc and /sys lie under `root`; load and versions are those of
    this process in any case."""
    processors = _processors(root)
    flags = {f for p in processors for f in (p.get("flags") or p.get("Features") or "").split()}
    cores = _count(text(root / "sys/devices/system/cpu/online")) or os.cpu_count() or 1
    status = fields(text(root / "proc/self/status") or "")
    memory = memory_mb(root)
    swap, swap_free = memory.get("SwapTotal"), memory.get("SwapFree")
    current, lowest, highest = (
        [khz // 1000 for policy in cpu_policies(root) if (khz := number(policy / name))]
        for name in ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq")
    )
    governors = {text(policy / "scaling_governor") for policy in cpu_policies(root)} - {None}
    return Machine(
        cpu=_cpu_name(processors) or platform.processor() or platform.machine(),
        board=board(root),
        isa=tuple(flag for flag in _TELLING_FLAGS if flag in flags),
        cores=cores,
        usable_cores=_count(status.get("Cpus_allowed_list")) or _affinity() or cores,
        cpu_quota=cpu_quota(root),
        governor=", ".join(sorted(map(str, governors))) or None,
        mhz=max(current, default=None) or _cpuinfo_mhz(processors),
        min_mhz=min(lowest, default=None),
        max_mhz=max(highest, default=None),
        l2_kb=cache_kb(2, root),
        l3_kb=cache_kb(3, root),
        memory_mb=memory.get("MemTotal"),
        available_mb=memory.get("MemAvailable"),
        memory_limit_mb=memory_limit_mb(root),
        swap_used_mb=None if swap is None or swap_free is None else swap - swap_free,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=dict(_versions()),
    )


def board(root: Path = _ROOT) -> str | None:
    """The model of a Jetson, a Raspberry Pi, …; None where there is no device tree."""
    return text(root / "proc/device-tree/model")


def cpu_policies(root: Path = _ROOT) -> list[Path]:
    """One folder per group of cores that share a frequency; none in most virtual machines."""
    return sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*"))


def cache_kb(level: int, root: Path = _ROOT) -> int | None:
    """Size of the first core's (unified) cache of that level, in KiB."""
    for index in root.glob("sys/devices/system/cpu/cpu0/cache/index*"):
        size = text(index / "size") or ""
        if number(index / "level") == level and size.endswith("K") and size[:-1].isdigit():
            return int(size[:-1])
    return None


def memory_mb(root: Path = _ROOT) -> dict[str, int]:
    """The entries of /proc/meminfo in MiB; empty where there is none."""
    entries = fields(text(root / "proc/meminfo") or "").items()
    return {name: int(value.split()[0]) // 1024 for name, value in entries if value.endswith(" kB")}


def memory_limit_mb(root: Path = _ROOT) -> int | None:
    """What this process's control groups allow, in MiB. Version 1 says "none" by a number
    near 2⁶³."""
    limits = (
        number(group / name)
        for group in control_groups("memory", root)
        for name in ("memory.max", "memory.limit_in_bytes")
    )
    return min((limit >> 20 for limit in limits if limit and limit < 1 << 60), default=None)


def _processors(root: Path) -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo, one per core."""
    blocks = (text(root / "proc/cpuinfo") or "").split("\n\n")
    return [block for block in map(fields, blocks) if "processor" in block]


def _cpu_name(processors: list[dict[str, str]]) -> str:
    """x86 reports a name; ARM reports codes, and its cores may be of several kinds."""
    codes = (f"{p.get('CPU implementer', '')} {p.get('CPU part', '')}" for p in processors)
    kinds = Counter(
        p.get("model name", "") if "CPU part" not in p else _ARM_CORES.get(code, code)
        for p, code in zip(processors, codes, strict=True)
    )
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(f"{count}× {kind}" for kind, count in kinds.items())


def _cpuinfo_mhz(processors: list[dict[str, str]]) -> int | None:
    """What x86 reports where no governor sets the frequency."""
    return max((round(float(p["cpu MHz"])) for p in processors if "cpu MHz" in p), default=None)


def _count(ranges: str | None) -> int | None:
    """How many cores a list such as 0-3,6 names."""
    if not ranges:
        return None
    ends = [[int(end) for end in part.split("-")] for part in ranges.split(",")]
    return sum(end[-1] - end[0] + 1 for end in ends)


def _affinity() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
