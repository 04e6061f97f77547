"""Threads that compute one pass after another together (`kernels.schedule`)."""

from __future__ import annotations

import ctypes
import sys
from _thread import start_new_thread
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock, RLock, get_ident
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.errors import EngineError
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.compiled import Entry, kernels


class ThreadTeam:
    """Persistent compute threads, the caller being the first. The others wait in a loop for
    some milliseconds, as threads of compute libraries do, and then sleep."""

    def __init__(self, threads: int, model: NDArray[np.int64], traits: Traits) -> None:
        """model: its table (`kernels.layout`)."""
        self._entry = kernels(traits)
        self._control = np.zeros(t.SLEEPERS + t.LINE * (threads + 1), np.int64)
        self._control[t.THREADS] = threads
        self._control[t.YIELD] = _yield_address()
        self.table = np.zeros(t.TABLE, np.int64)
        self.table[t.CONTROL] = self._control.ctypes.data
        self.table[t.MODEL] = model.ctypes.data
        claims = np.zeros(t.CLAIM * (int(model[t.LAYERS]) + 1), np.int64)
        self.table[t.CLAIMS] = claims.ctypes.data
        self._address = self.table.ctypes.data
        # A signal handler may interrupt its holder and compute a pass of its own: the job that
        # is handed out lies within a single call.
        self._lock = RLock()
        self._changing = False
        # Each is locked while its thread may sleep. Semaphores of Python do not survive Ctrl-C.
        self._wake = [Lock() for _ in range(threads)]
        for lock in self._wake:
            lock.acquire()
        self._at_work: dict[int, int] = {}  # which thread has which number
        # The threads refer to the memory that they use, not to the team, so that it can be freed.
        self._held = (self._control, self.table, model, claims)
        self._end = finalize(self, _stop, self._control, self._wake)
        self._end.atexit = False  # a pass may be under way; daemon threads end by themselves

    def run(self, job: int) -> None:
        """Computes the pass at address `job`; may be called from several threads.

        Raises EngineError after `stop`, or when there are no threads to be had.
        """
        with self._lock:
            self._check()
            if len(self._at_work) < len(self._wake) - 1:
                self._start()
            try:
                while (asleep := self._entry(self._address, -job)) > 0:
                    for number, lock in enumerate(self._wake):
                        if asleep >> number & 1:
                            _wake(lock)
            except BaseException:  # interrupted before the job was handed out
                self._control[t.COMING] = 0
                raise
            if asleep:
                self._check()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """While no pass is computed: the buffers may be changed. Raises as `run`."""
        with self._lock:
            self._check()
            self._changing = True
            try:
                yield
            finally:
                self._changing = False

    def _check(self) -> None:
        if self._changing:  # by this thread, which a signal handler has interrupted
            raise EngineError("the model is being prepared for a request", "ask again later")
        if not self._end.alive:
            raise EngineError("the model was closed", "load it again")

    def stop(self) -> None:
        with self._lock:
            self._end()

    def _start(self) -> None:
        for number in range(1, len(self._wake)):
            if number not in self._at_work:
                arguments = (self._entry, self._held, number, self._wake, self._at_work)
                try:  # Thread.start would wait for ever for one that has no memory to begin
                    start_new_thread(_work, arguments)
                except RuntimeError as error:
                    raise EngineError(f"no thread to be had: {error}") from None


def _yield_address() -> int:
    """Of the C function with which a thread gives its core to another one."""
    if sys.platform == "win32":
        function: Any = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _work(
    entry: Entry,
    held: tuple[NDArray[np.int64], ...],
    number: int,
    wake: list[Lock],
    at_work: dict[int, int],
) -> None:
    if at_work.setdefault(number, get_ident()) != get_ident():
        return  # started twice: the first start was interrupted before it was recorded
    address = held[1].ctypes.data
    while not entry(address, number):
        wake[number].acquire()


def _stop(control: NDArray[np.int64], wake: list[Lock]) -> None:
    control[t.STOP] = 1
    for lock in wake:
        _wake(lock)


def _wake(lock: Lock) -> None:
    with suppress(RuntimeError):  # woken before, and not yet awake
        lock.release()
