"""Threads that compute one pass after another together (`kernels.gpt2`)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Semaphore, Thread
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.kernels import tables as t
from edge_slm_runtime.kernels.compiled import Entry, kernels


class Crew:
    """`threads` of them, the caller being the first. The others wait in a loop for some
    milliseconds, as threads of compute libraries do, and then sleep."""

    def __init__(self, threads: int) -> None:
        self._entry = kernels()
        self._control = np.zeros(t.SLEEPERS + t.LINE * (threads + 1), np.int64)
        self._control[t.THREADS] = threads
        self._control[t.YIELD] = _yield_address()
        self.table = np.zeros(t.TABLE, np.int64)
        self.table[t.CONTROL] = self._control.ctypes.data
        self._address = self.table.ctypes.data
        self._wake = [Semaphore(0) for _ in range(threads)]
        self._lock = Lock()
        self._started = False
        # The threads hold what they work with, not the crew, so that it can end.
        self._end = finalize(self, _stop, self._entry, self._control, self.table, self._wake)

    def run(self, job: int) -> None:
        """Computes the pass at address `job`; may be called from several threads."""
        with self._lock:
            if not self._started:
                self._start()
            self.table[t.JOB] = job
            _call(self._entry, self._address, self._wake)
            self._entry(self._address, 0)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """While no pass is computed: the buffers may be changed."""
        with self._lock:
            yield

    def stop(self) -> None:
        with self._lock:
            self._end()

    def _start(self) -> None:
        self._started = True
        for number in range(1, len(self._wake)):
            Thread(
                target=_work,
                args=(self._entry, self._address, self._control, self.table, number, self._wake),
                daemon=True,
            ).start()


def _yield_address() -> int:
    """Of the C function with which a thread gives its core to another one."""
    if sys.platform == "win32":
        function: Any = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _call(entry: Entry, address: int, wake: list[Semaphore]) -> None:
    asleep = entry(address, -1)
    for number in range(1, len(wake)):
        if asleep >> number & 1:
            wake[number].release()


def _work(
    entry: Entry,
    address: int,
    control: NDArray[np.int64],
    table: NDArray[np.int64],
    number: int,
    wake: list[Semaphore],
) -> None:
    """control, table: kept alive, the kernels look at them."""
    while not entry(address, number):
        wake[number].acquire()


def _stop(
    entry: Entry, control: NDArray[np.int64], table: NDArray[np.int64], wake: list[Semaphore]
) -> None:
    control[t.STOP] = 1
    _call(entry, table.ctypes.data, wake)
