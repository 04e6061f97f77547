"""Answers that may be abandoned while they are computed."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from threading import Lock
from typing import TypeVar

from edge_slm_runtime.bound import Bound
from edge_slm_runtime.errors import EngineError

Item = TypeVar("Item")


class Closable(Bound, Iterator[Item]):
    """A generator with one reader at a time that may be closed at any time: from another thread,
    or by a signal handler that has interrupted the reader. What is being computed then is the
    last, and the reader's loop ends.

    The lock is never waited for, so nothing can wait for itself.
    """

    def __init__(self, items: Generator[Item, None, None]) -> None:
        self._items = items
        self._closed = False
        self._running = Lock()

    def __next__(self) -> Item:
        """Raises EngineError while another caller is in it."""
        if not self._running.acquire(blocking=False):
            raise EngineError("another caller is reading this answer", "start one for each reader")
        try:
            item = next(self._items)
        finally:
            self._running.release()
        if self._closed:
            self.close()
            raise StopIteration
        return item

    def close(self) -> None:
        """Ends it; nothing more is computed than what is under way."""
        self._closed = True  # before the attempt: a reader looks at it after its own
        if self._running.acquire(blocking=False):
            try:
                self._items.close()
            finally:
                self._running.release()
