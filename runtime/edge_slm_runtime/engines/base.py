"""What an engine is to the generator: a source of tokens for drafts."""

from __future__ import annotations

import atexit
import ctypes
import os
from collections.abc import Iterable, Iterator
from typing import Any, Protocol
from weakref import WeakSet

from edge_slm_runtime.draft import Draft, Step
from edge_slm_runtime.errors import EngineError, UsedAfterFork
from edge_slm_runtime.sampling import Sampling


class Engine(Protocol):
    """A loaded model. `name` is the package, `threads` what it computes with."""

    name: str
    threads: int

    def check(self, sampling: Sampling) -> None:
        """Raises NotSupportedByEngine when a setting cannot be honoured."""

    def decode(self, drafts: Iterable[Draft], batch_size: int) -> Iterator[Step]:
        """Writes every draft to its end; one Step per token, drafts interleaved.

        Drafts are drawn as places get free, at most `batch_size` at a time.
        Raises UsedAfterFork, EngineError.
        """

    def close(self) -> None:
        """Frees the model; the engine cannot be used afterwards."""


class Native:
    """Holds the native model of an engine and decides who may touch it.

    A forked child has none of the threads that the model waits for: using it or
    even freeing it there would hang, so the child is refused and never frees it.
    At exit the model is freed while Python still runs: CTranslate2's threads
    abort the process when they outlive the interpreter.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._pid = os.getpid()
        _LIVE.add(self)

    @property
    def forked(self) -> bool:
        return os.getpid() != self._pid

    @property
    def closed(self) -> bool:
        return self._model is None

    def get(self) -> Any:
        """Raises UsedAfterFork, or EngineError after `close`."""
        if self.forked:
            raise UsedAfterFork(
                "the model was loaded before this process was forked",
                "load it in the child, or start the child with spawn",
            )
        if self._model is None:
            raise EngineError("the model was closed", "load it again")
        return self._model

    def close(self) -> None:
        if not self.forked:
            self._model = None

    def leak(self) -> None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._model))


_LIVE: WeakSet[Native] = WeakSet()


def _close_all() -> None:
    for native in list(_LIVE):
        native.close()


def _leak_all() -> None:
    for native in list(_LIVE):
        native.leak()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leak_all)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
