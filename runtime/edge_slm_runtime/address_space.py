"""What a limit of the address space (`ulimit -v`) leaves this process."""

from __future__ import annotations

import mmap
from pathlib import Path


def room_mb() -> float:
    """MiB; infinite where there is no limit, or where it cannot be known."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * mmap.PAGESIZE
    except (ImportError, OSError):
        return float("inf")
    return float("inf") if limit == resource.RLIM_INFINITY else max(0, limit - used) / (1 << 20)
