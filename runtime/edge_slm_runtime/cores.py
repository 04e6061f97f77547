"""The processor, and how many of its cores this process may use: its affinity, and the quota of its
control groups."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_THREADS_CAP = 8  # decoding is bound by memory bandwidth; more threads only fight


@cache
def processor() -> str:
    """Its architecture, and from the second line on its name and features. A process that is
    emulated has the emulator's architecture here, but its /proc may be the host's."""
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").partition("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    facts = ("model name", "flags", "Features", "CPU part")
    lines = [line for line in first.splitlines() if line.startswith(facts)]
    return "\n".join([platform.machine(), *lines])


def default_threads(root: Path = Path("/")) -> int:
    """Cores this process may run on and has the time of, at least 1, at most 8.

    Half a core's quota is rounded down: a thread that is throttled makes all others
    wait for it. `root` is where /proc and /sys lie.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota(root)
    if quota is not None:
        cores = min(cores, math.floor(quota))
    return max(1, min(cores, _THREADS_CAP))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many cores' time the control groups of this process allow; None without a limit.

    Version 2 says `quota period` or `max period` in one file, version 1 in two.
    """
    quotas = []
    for group in control_groups("cpu", root):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        used, span = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        for time, whole in ((quota, period), (used, span)):
            if time.isdigit() and whole.isdigit() and int(whole):  # "max" and -1 are no limit
                quotas.append(int(time) / int(whole))
    return min(quotas, default=None)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders that hold this process, and those above, of either version of cgroups."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in ("", "unified") if not controllers else (controllers, controller):
            top = root / "sys/fs/cgroup" / mount
            group = top / path.lstrip("/")
            # Inside a container the path may be the host's: what exists of it counts.
            yield from (g for g in (group, *group.parents) if g.is_relative_to(top))


def _text(path: Path) -> str:
    """The stripped content; empty when there is none to read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
