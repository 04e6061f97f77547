"""One child process per measurement; a crash becomes EngineError.

A process of its own gives an honest load time and an honest peak memory (VmHWM
belongs to the process image; the imports of the parent do not count).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_slm_runtime import errors

_POLL = 0.02  # seconds between looks at a limited process


def launch(
    job: Mapping[str, Any], *, memory_limit_mb: float | None = None, timeout_s: float | None = None
) -> dict[str, Any]:
    """Runs a job of `edge_slm_bench.cell` and returns its result.

    memory_limit_mb: resident memory (MiB) at which the process is killed. Raises the
    EdgeSlmError of the child, EngineError when it died, OutOfMemory at the limit.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "edge_slm_bench.cell"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
        )
        try:
            assert child.stdin
            try:
                child.stdin.write(json.dumps(job).encode())
                child.stdin.close()
            except BrokenPipeError:
                pass  # it died at once; its status says more
            _wait(child, memory_limit_mb, timeout_s)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        out.seek(0)
        err.seek(0)
        return _answer(child.returncode, out.read().decode("utf-8", "replace"), err.read())


def _wait(child: subprocess.Popen[bytes], limit_mb: float | None, timeout_s: float | None) -> None:
    if limit_mb is None:
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise errors.EngineError(f"took more than {timeout_s:g} s") from None
        return
    deadline = time.monotonic() + timeout_s if timeout_s else None
    while child.poll() is None:
        if (resident := rss_mb(child.pid)) is not None and resident > limit_mb:
            raise errors.OutOfMemory(
                f"killed at its memory limit: {resident:.0f} MB, allowed {limit_mb:g} MB"
            )
        if deadline and time.monotonic() > deadline:
            raise errors.EngineError(f"took more than {timeout_s:g} s")
        time.sleep(_POLL)


def rss_mb(pid: int | str = "self") -> float | None:
    """Resident memory of a process in MiB; None where it is unknown."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    except (OSError, IndexError, ValueError):
        try:
            import psutil

            own = os.getpid() if pid == "self" else int(pid)
            return float(psutil.Process(own).memory_info().rss) / 2**20
        except Exception:  # not installed, or the process is gone
            return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _answer(status: int, out: str, err: bytes) -> dict[str, Any]:
    lines = out.splitlines()
    if status or not lines:
        said = [line for line in err.decode("utf-8", "replace").splitlines() if line.strip()]
        last = said[-1].strip() if said else "it said nothing"
        if status < 0:
            name = signal.Signals(-status).name
            hint = "; the system's memory killer does that" if name == "SIGKILL" else ""
            last = f"killed by {name}{hint}"
        raise errors.EngineError(f"the process ended with status {status}: {last}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        name, problem, hint = answer["error"]
        raise getattr(errors, name)(problem, hint)
    return answer
