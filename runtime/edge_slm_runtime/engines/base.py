"""The interface of engines: a source of tokens for answers, and facts about itself."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from time import monotonic, sleep
from typing import Any, ClassVar, TypeVar
from weakref import WeakSet

import numpy as np

from edge_slm_runtime.answer import Answer, Step
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.deltas import Delta
from edge_slm_runtime.errors import (
    EdgeSlmError,
    EngineError,
    NotSupportedByEngine,
    OutOfMemory,
    UsedAfterFork,
)
from edge_slm_runtime.sampling import Logits, Sampling

Result = TypeVar("Result")
PREFILL = 256  # positions of a prompt that are computed at once, to bound the memory they take


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a variant is opened.

    cache_bytes: of keys and values kept for prompts that begin alike, 0 keeps none.
    speculate: guess tokens and check several at once. prefill_tokens: of a prompt, computed at
    once. fewer_threads: take fewer while these are quicker. An engine ignores what it cannot do.
    """

    precision: str = "int8"
    threads: int = 1
    cache_bytes: int = 0
    speculate: bool = False
    prefill_tokens: int = PREFILL
    fewer_threads: bool = False


class Engine(ABC):
    """A loaded model, and as class attributes the facts about its engine.

    name: in manifests, and the package that it needs. install: the command that installs it.
    main_file: what it opens in a variant's folder. seeds: a request's seed is honoured.
    constrains: what an answer may say can be limited (`ban`), and `logprobs` are known. batches:
    several answers are computed together. prefix_cache: prompts that begin alike are computed
    once. guesses: `EngineOptions.speculate` is honoured. adapts: adapters can be kept beside the
    weights (`adapted`), and each answer have its own. cache_dtype: of keys and values.
    cache_block: positions whose keys lie together. process_mb: MiB of a process with the engine
    and no model in it; resident: by precision, bytes of memory per byte of weights once the engine
    has packed them (both fitted on Linux x86-64 with CPython 3.11, onnxruntime 1.31 and
    ctranslate2 4.8 to models of 11M and 98M parameters). loads_table_twice: the embedding is in
    memory twice during loading. thread_room_mb: MiB of address space that a thread takes.
    """

    name: ClassVar[str]
    install: ClassVar[str]
    main_file: ClassVar[str]
    seeds: ClassVar[bool] = True
    constrains: ClassVar[bool] = True
    batches: ClassVar[bool] = True
    prefix_cache: ClassVar[bool] = True
    guesses: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    cache_dtype: ClassVar[Any] = np.float32
    cache_block: ClassVar[int] = 1
    process_mb: ClassVar[float]
    resident: ClassVar[Mapping[str, float]]
    loads_table_twice: ClassVar[bool] = True
    thread_room_mb: ClassVar[int] = 8

    threads: int

    @abstractmethod
    def __init__(self, folder: Path, decoder: Decoder, options: EngineOptions) -> None:
        """Loads the variant in `folder`.

        Raises EngineError when the engine refuses it, OutOfMemory, ManifestInvalid when it is not
        the model of `decoder`, ImportError when the engine's package is not there.
        """

    @classmethod
    def installed(cls) -> bool:
        return importlib.util.find_spec(cls.name) is not None

    @classmethod
    def fast_here(cls) -> bool:
        """Whether this processor has the instructions that make the engine fast."""
        return True

    @classmethod
    def preload(cls, decoder: Decoder) -> None:
        """Imports the modules that opening needs, so that this can overlap with other work.

        Raises ImportError.
        """
        importlib.import_module(cls.name)

    @classmethod
    def work_floats(cls, decoder: Decoder, rows: int, prefill: int, tokens: int) -> int:
        """float32 values of activations while a prompt is computed, `prefill` positions at once
        of `tokens` in all: a part of the feed-forward layer's, and attention scores."""
        return prefill * 24 * decoder.width + decoder.heads * prefill * tokens

    def check(self, sampling: Sampling) -> None:  # noqa: B027 - most engines can honour all
        """Raises NotSupportedByEngine when a setting cannot be honoured."""

    def adapted(self, delta: Delta) -> Any:
        """`Adapter.memory` of an adapter of this model.

        Raises NotSupportedByEngine, AdapterInvalid, UsedAfterFork, EngineError.
        """
        raise NotSupportedByEngine(
            f"{self.name} keeps no adapters beside the weights",
            "load engine numba, or merge it: edge-slm convert --adapter",
        )

    @abstractmethod
    def decode(self, answers: Iterable[Answer], batch_size: int) -> Iterator[Step]:
        """Writes every answer to its end; one Step per token and per pass of a long prompt,
        answers interleaved.

        Answers are drawn as places get free, at most `batch_size` at a time.
        Raises UsedAfterFork, EngineError, OutOfMemory.
        """

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The prediction [V] after each of `ids`, token by token as decoding computes it. The
        array may be reused. Raises as `decode`."""

    def trim_memory(self) -> None:  # noqa: B027
        """Gives back what is kept only to save time later."""

    @abstractmethod
    def close(self) -> None:
        """Frees the model; the engine cannot be used afterwards."""


class Native:
    """Holds the native model of an engine and decides who may touch it.

    A forked child has none of the threads that the model waits for: using it or
    even freeing it there would hang, so the child is refused and never frees it.
    At exit the model is freed while Python still runs (`_end_all`): threads of CTranslate2
    abort the process when they outlive the interpreter, and so does a daemon thread that
    returns from a native call to an interpreter that has ended.
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
        """Raises UsedAfterFork, or EngineError after `close` and while the interpreter ends."""
        if self.forked:
            raise UsedAfterFork(
                "the model was loaded before this process was forked",
                "start the child with spawn, or load it in the child (not with ctranslate2)",
            )
        if self._model is None or _ending:
            raise EngineError("the model was closed", "load it again")
        return self._model

    def call(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """function(model, …), a native call that the end of the interpreter waits for.

        Raises as `get`."""
        thread = get_ident()
        _CALLS.append(thread)
        try:
            return function(self.get(), *arguments, **options)
        finally:
            _CALLS.remove(thread)

    def close(self) -> None:
        if not self.forked:
            self._model = None

    def leak(self) -> None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._model))


_LIVE: WeakSet[Native] = WeakSet()
_OPEN: WeakSet[Generator[Any, None, None]] = WeakSet()
_CALLS: list[int] = []  # the thread of each native call under way
_LONGEST = 30.0  # seconds that the end of the interpreter waits for native calls
_ending = False


def ended_at_exit(steps: Generator[Step, None, None]) -> Generator[Step, None, None]:
    """`steps`, which are closed at exit if somebody holds them still: what they clean up
    needs an interpreter that is whole."""
    _OPEN.add(steps)
    return steps


def _end_all() -> None:
    """Refuses new native calls, waits for those of daemon threads, frees all models."""
    global _ending
    _ending, latest = True, monotonic() + _LONGEST
    # This thread is in none; what it interrupted before it was recorded as ended is no call.
    while {*_CALLS} - {get_ident()} and monotonic() < latest:
        sleep(0.001)
    for steps in list(_OPEN):
        with suppress(ValueError):  # a daemon thread is reading it
            steps.close()
    for native in list(_LIVE):
        native.close()


def _after_fork() -> None:
    _CALLS.clear()  # of threads that the child does not have
    for native in list(_LIVE):
        native.leak()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_NO_MEMORY = re.compile("bad.alloc|(failed to|cannot) allocate", re.IGNORECASE)


def native_error(what: str, error: Exception) -> EdgeSlmError:
    """What a native library or the system raised as ours: OutOfMemory where it was for want of
    memory, which each says in its own way, otherwise EngineError."""
    line = f"{what}: {first_line(error)}"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(line):
        return OutOfMemory(line, "choose a smaller batch_size, or a smaller variant")
    return EngineError(line)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
