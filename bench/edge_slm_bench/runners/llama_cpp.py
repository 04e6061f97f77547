"""llama.cpp through the C functions that llama-cpp-python exposes: `llama_decode` and its
logits, as `llama-bench` drives it; none of the Python package's own loop.

The same threads for prompt and steps, the file memory-mapped with weights repacked for
the processor, flash attention where llama.cpp chooses it, an F16 cache: its defaults. A
prompt is handed over whole. Logits are computed for the last position alone, but for
`logits`. Every row of a batch is a sequence of its own.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edge_slm_bench.runners.base import Float32, Spec
from edge_slm_bench.runners.greedy import GreedyRunner, Int64
from edge_slm_runtime.errors import DependencyMissing, EngineError, OutOfMemory

_kept: list[Any] = []  # the log callback: llama.cpp holds its bare address


def instruction_sets() -> str:
    """Those that llama.cpp was compiled with; "" where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return ""
    facts = str(llama_cpp.llama_print_system_info(), "utf-8").partition(":")[2].split("|")
    pairs = [fact.split("=") for fact in facts if "=" in fact]
    return " ".join(name.strip() for name, value in pairs if value.strip() == "1")


def open(spec: Spec, threads: int) -> LlamaCppRunner:  # noqa: A001
    """Raises DependencyMissing, EngineError."""
    try:
        import llama_cpp
    except ImportError:
        raise DependencyMissing(
            "llama.cpp is not installed", "pip install 'edge-slm[peers]'"
        ) from None
    if not _kept:
        _kept.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
        llama_cpp.llama_log_set(_kept[0], None)
        llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(spec.path.encode(), settings)
    if not model:
        raise EngineError(f"llama.cpp cannot load {spec.path}")
    return LlamaCppRunner(llama_cpp, model, threads)


class LlamaCppRunner(GreedyRunner):
    def __init__(self, library: Any, model: Any, threads: int) -> None:
        self._library, self._model, self._threads = library, model, threads
        vocabulary = library.llama_model_get_vocab(model)
        self._vocab_size = library.llama_vocab_n_tokens(vocabulary)
        self._positions = library.llama_model_n_ctx_train(model)
        self._context: Any = None
        self._rows = self._seen = 0

    def reset(self, rows: int, prompt_tokens: int) -> None:
        if rows != self._rows:
            self._open_context(rows)
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_clear(memory, False)
        self._seen = 0

    def step(self, ids: Int64, *, every: bool = False) -> Float32:
        batch = _Batch(self._library, ids, self._seen, every)
        if status := self._library.llama_decode(self._context, batch.struct):
            raise EngineError(f"llama.cpp failed: llama_decode returned {status}")
        self._seen += ids.shape[1]
        logits = self._library.llama_get_logits(self._context)  # of the wanted ones, in order
        shape = (len(ids), ids.shape[1] if every else 1, self._vocab_size)
        return np.ctypeslib.as_array(logits, shape)

    def close(self) -> None:
        self._close_context()
        if self._model is not None:
            self._library.llama_model_free(self._model)
            self._model = None

    def _open_context(self, rows: int) -> None:
        """A context for `rows` sequences, each of the model's whole length."""
        self._close_context()
        settings = self._library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = rows * self._positions
        settings.n_ubatch = max(self._positions, settings.n_ubatch)
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.no_perf = True
        self._context = self._library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise OutOfMemory(f"llama.cpp has no memory for {rows} sequences")
        self._rows = rows

    def _close_context(self) -> None:
        if self._context:
            self._library.llama_free(self._context)
        self._context, self._rows = None, 0


class _Batch:
    """Ids [R,S] as the arrays that a llama_batch points to, one sequence a row."""

    def __init__(self, library: Any, ids: Int64, start: int, every: bool) -> None:
        rows, width = ids.shape
        sequences = np.repeat(np.arange(rows, dtype=np.int32), width)
        wanted = np.full(ids.shape, every, np.int8)
        wanted[:, -1] = 1
        self._arrays = {
            "token": ids.astype(np.int32),
            "pos": np.tile(np.arange(start, start + width, dtype=np.int32), rows),
            "n_seq_id": np.ones(ids.size, np.int32),
            "seq_id": np.uintp(sequences.ctypes.data) + 4 * np.arange(ids.size, dtype=np.uintp),
            "logits": wanted,
        }
        self._sequences = sequences  # kept alive: `seq_id` holds addresses in it
        self.struct = library.llama_batch(n_tokens=ids.size)
        for name, kind in self.struct._fields_:
            if name in self._arrays:
                address = ctypes.c_void_p(self._arrays[name].ctypes.data)
                setattr(self.struct, name, ctypes.cast(address, kind))
