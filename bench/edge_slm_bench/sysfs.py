"""Small files in which the kernel describes the machine, read once or at intervals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


def text(path: Path) -> str | None:
    """The stripped content; None when the file is missing, unreadable or empty."""
    try:
        # The strings of a device tree end with a NUL.
        return path.read_text("utf-8", "replace").strip("\0 \n") or None
    except OSError:
        return None


def number(path: Path) -> int | None:
    """The integer in a file; None when there is none."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None


def fields(content: str) -> dict[str, str]:
    """The `name: value` lines of a text, the first of each name."""
    values: dict[str, str] = {}
    for line in content.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            values.setdefault(name.strip(), value.strip())
    return values


class Periodic:
    """Calls `work` every `interval` seconds on a thread of its own, from `start` to `stop`."""

    def __init__(self, work: Callable[[], None], interval: float) -> None:
        self._work, self._interval = work, interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the last call of `work` has."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self._work()
