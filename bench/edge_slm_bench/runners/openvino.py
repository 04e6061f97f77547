"""OpenVINO on the CPU: a stateful model (`edge_slm_converters.openvino_ir` writes it), its
KV cache inside, one inference request, hint LATENCY with one stream.

fp32 computes and caches in float32: left alone, the plugin takes bfloat16 where the
processor has it, and an 8-bit cache. int8 keeps these defaults, the fastest that it has.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_bench.runners.base import Float32, Spec
from edge_slm_bench.runners.greedy import GreedyRunner, Int64
from edge_slm_runtime.engines.base import first_line
from edge_slm_runtime.errors import DependencyMissing, EngineError

MODEL = "openvino_model.xml"
FULL_PRECISION = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def import_openvino() -> Any:
    """Without its telemetry, which is on by default and sends at import and conversion.

    Raises DependencyMissing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # not importable
    try:
        import openvino
    except ImportError:
        raise DependencyMissing(
            "OpenVINO is not installed", "pip install 'edge-slm[peers]'"
        ) from None
    return openvino


def open(spec: Spec, threads: int) -> OpenVinoRunner:  # noqa: A001
    """Raises DependencyMissing, EngineError."""
    openvino = import_openvino()
    settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    if spec.precision == "fp32":
        settings |= FULL_PRECISION
    try:
        model = openvino.Core().compile_model(Path(spec.path) / MODEL, "CPU", settings)
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot load {spec.path}: {first_line(error)}") from None
    return OpenVinoRunner(model.create_infer_request())


class OpenVinoRunner(GreedyRunner):
    def __init__(self, request: Any) -> None:
        self._request = request
        self._seen = 0

    def reset(self, rows: int, prompt_tokens: int) -> None:
        self._request.reset_state()
        self._seen = 0

    def step(self, ids: Int64, *, every: bool = False) -> Float32:
        rows, width = ids.shape
        positions = np.arange(self._seen, self._seen + width, dtype=np.int64)
        self._seen += width
        feed = {
            "input_ids": ids,
            "position_ids": np.broadcast_to(positions, ids.shape).copy(),
            "keep": np.arange(width) if every else np.array([width - 1]),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        logits: Float32 = self._request.infer(feed, share_inputs=True, share_outputs=True)["logits"]
        return logits
