"""Waiting for what another thread does, from threads and from coroutines alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Lock


class Wakeup:
    """Wakes all that wait. Nothing in it waits for a lock that another holds, so a signal handler
    or a finaliser may call it anywhere. (threading's conditions would wait for themselves.)"""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], object]] = []

    def __call__(self) -> None:
        for wake in tuple(self._waiting):
            with suppress(RuntimeError):  # woken already, or its event loop has ended
                wake()

    def wait(self, ready: Callable[[], object]) -> None:
        """Until `ready()`, which is asked after each call."""
        lock = Lock()
        lock.acquire()
        self._waiting.append(lock.release)
        try:
            while not ready():
                lock.acquire()
        finally:
            self._waiting.remove(lock.release)

    async def awaited(self, ready: Callable[[], object]) -> None:
        """`wait` of a coroutine."""
        import asyncio

        loop, event, called = asyncio.get_running_loop(), asyncio.Event(), False

        def wake() -> None:
            nonlocal called
            if not called:
                called = True
                loop.call_soon_threadsafe(event.set)

        self._waiting.append(wake)
        try:
            while not ready():
                await event.wait()
                event.clear()
                called = False
        finally:
            self._waiting.remove(wake)
