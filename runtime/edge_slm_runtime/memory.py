"""Peak memory of this process, and how many cores it may use."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

_THREADS_CAP = 8  # decoding is bound by memory bandwidth; more threads only fight


def peak_rss_mb() -> float:
    """Peak resident memory in MiB: VmHWM where there is a /proc, else getrusage."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
        if match:
            return int(match[1]) / 1024
    except (OSError, UnicodeDecodeError):
        pass
    try:
        import resource
    except ImportError:  # Windows has neither
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def default_threads() -> int:
    """Cores this process may run on, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, _THREADS_CAP)
