"""ONNX Runtime: a graph of its fused operators, bound to our KV cache.

Each layer's slice of the cache is bound as both past and present, so GroupQueryAttention
appends in place. fp32 and int8 give a row the same numbers alone and in a batch; 4-bit
kernels round a lone row differently. Attention rounds a lone query differently from
several, so nothing is guessed: guesses must not change an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.deltas import Adapter
from edge_slm_runtime.engines.base import EngineOptions, Native, native_error
from edge_slm_runtime.engines.kv_cache import Array
from edge_slm_runtime.engines.stepping import SteppingEngine
from edge_slm_runtime.errors import ManifestInvalid
from edge_slm_runtime.sampling import Logits


class OnnxEngine(SteppingEngine):
    name = "onnxruntime"
    install = "pip install edge-slm"
    main_file = "model.onnx"
    process_mb = 67.0
    # A block's scale is in memory three times: in the file, packed, and times its weights' sum.
    resident: ClassVar = {"fp32": 1.0, "int8": 1.12, "int4": 1.18}

    def __init__(self, folder: Path, decoder: Decoder, options: EngineOptions) -> None:
        import onnxruntime as ort

        if hasattr(ort, "disable_telemetry_events"):
            ort.disable_telemetry_events()  # the app may have imported it before us
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        file = folder / self.main_file
        try:
            session = ort.InferenceSession(
                str(file),
                settings,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # which prints on stdout, and fails once more
            )
            inputs = {item.name: item for item in session.get_inputs()}
            layers = sum(name.endswith(".key") for name in inputs)
            _, heads, _, head_width = inputs["past_key_values.0.key"].shape
            outputs = {item.name: item for item in session.get_outputs()}
            vocab_size = int(outputs["logits"].shape[-1])
        except Exception as error:  # onnxruntime has one exception class per status code
            raise native_error(f"onnxruntime cannot load {folder.name}", error) from None
        found = (layers, int(heads), int(head_width), vocab_size)
        expected = (decoder.layers, decoder.kv_heads, decoder.head_width, decoder.vocab_size)
        if found != expected:
            raise ManifestInvalid(
                f"{folder.name} has layers, key-value heads, their width, vocabulary {found}, "
                f"the manifest says {expected}"
            )
        super().__init__(Native(session), decoder, options)

    def new_pass(
        self, cache: Array, width: int, kept: int, adapters: Sequence[Adapter | None] = ()
    ) -> _Pass:
        """The graph computes logits after the last new token only."""
        return _Pass(self, cache, width)


class _Pass:
    def __init__(self, engine: OnnxEngine, cache: Array, width: int) -> None:
        rows = cache.shape[1]
        self._native = engine.native
        # In onnxruntime 1.23 a binding holds no reference to its session. Without this one,
        # closing the model in another thread would free the session while it is in use.
        self._session = engine.native.get()
        self._binding = self._session.io_binding()
        self._ids = np.zeros((rows, width), np.int64)
        self._positions = np.zeros((rows, width), np.int64)
        self._seqlens_k = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self.logits = np.zeros((rows, 1, engine.decoder.vocab_size), np.float32)
        self._cache = cache  # kept alive: the binding holds bare addresses
        self._bind("input", "input_ids", self._ids)
        self._bind("input", "position_ids", self._positions)
        self._bind("input", "seqlens_k", self._seqlens_k)
        self._bind("input", "total_sequence_length", self._total)
        self._bind("output", "logits", self.logits)
        for i in range(engine.decoder.layers):
            for part, half in zip(("key", "value"), cache[2 * i : 2 * i + 2], strict=True):
                self._bind("input", f"past_key_values.{i}.{part}", half)
                self._bind("output", f"present.{i}.{part}", half)

    def run(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Logits:
        width = self._ids.shape[1]
        self._ids[:] = ids
        # No arithmetic of numpy: a step leaves the caches cold, and each call takes its time.
        for row, start in enumerate(starts):
            self._positions[row] = range(start, start + width)
            self._seqlens_k[row] = start + width - 1
        self._total[()] = max(starts) + width
        self._native.call(_run, self._binding)
        return self.logits

    def _bind(self, way: str, name: str, array: NDArray[Any]) -> None:
        bind = self._binding.bind_input if way == "input" else self._binding.bind_output
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _run(session: Any, binding: Any) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise native_error("onnxruntime failed", error) from error
