"""Threads that compute one pass after another together (`kernels.schedule`)."""

from __future__ import annotations

import ctypes
import sys
from _thread import start_new_thread
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock, RLock, get_ident
from time import perf_counter
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.engines.pace import Pace
from edge_slm_runtime.errors import EngineError
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.kernels.compiled import Entry, kernels


class ThreadTeam:
    """Persistent compute threads, the caller being the first. The others wait in a loop for
    some milliseconds, as threads of compute libraries do, and then sleep."""

    def __init__(
        self, threads: int, model: NDArray[np.int64], traits: Traits, *, fewer: bool = False
    ) -> None:
        """model: its table (`kernels.layout`). fewer: the caller computes alone whatever that is
        quicker for (`Pace`)."""
        self._entry = kernels(traits)
        self._control = _control(threads)
        self.table = np.zeros(t.TABLE, np.int64)
        self.table[t.CONTROL] = self._control.ctypes.data
        self.table[t.MODEL] = model.ctypes.data
        claims = np.zeros(t.CLAIM * (int(model[t.LAYERS]) + 1), np.int64)
        self.table[t.CLAIMS] = claims.ctypes.data
        self._address = self.table.ctypes.data
        # A team of the caller, with the buffers of the other.
        self._control_alone, self._table_alone = _control(1), self.table.copy()
        self._paces: dict[int, Pace] | None = {} if fewer and threads > 1 else None  # by tokens
        self._was_alone = False
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

    def run(self, job: int, tokens: int = 1) -> None:
        """Computes the pass of `tokens` at address `job`; may be called from several threads.

        Raises EngineError after `stop`, or when there are no threads to be had.
        """
        with self._lock:
            self._check()
            if self._paces is None:
                self._run(job)
                return
            pace = self._paces.get(tokens)
            if pace is None:
                pace = self._paces[tokens] = Pace(alone=self._was_alone)
            self._was_alone = alone = pace.alone
            started = perf_counter()
            if alone:
                self._table_alone[:] = self.table
                self._table_alone[t.CONTROL] = self._control_alone.ctypes.data
                self._entry(self._table_alone.ctypes.data, -job)
            else:
                self._run(job)
            if pace.alone is alone:  # not turned by a signal handler meanwhile
                pace.note(perf_counter() - started)

    def _run(self, job: int) -> None:
        """By all threads."""
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


def _control(threads: int) -> NDArray[np.int64]:
    """What `threads` share (`kernels.layout`)."""
    control = np.zeros(t.SLEEPERS + t.LINE * (threads + 1), np.int64)
    control[t.THREADS] = threads
    control[t.YIELD] = _yield_address()
    return control


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
