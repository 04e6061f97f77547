"""What an engine is to the generator: a source of tokens for drafts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Protocol

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


class Guard:
    """Refuses use in a forked child (both engines would hang) and after close."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._open = True

    def check(self) -> None:
        if os.getpid() != self._pid:
            raise UsedAfterFork(
                "the model was loaded before this process was forked",
                "load it in the child, or start the child with spawn",
            )
        if not self._open:
            raise EngineError("the model was closed", "load it again")

    def close(self) -> None:
        self._open = False


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
