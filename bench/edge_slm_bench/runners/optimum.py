"""optimum on ONNX Runtime: `ORTModelForCausalLM` and the graph that optimum exports.

Its defaults but for the threads: the CPU provider, no IO binding (optimum takes it on a
GPU alone), logits of every position, as its graph computes them.
"""

from __future__ import annotations

import warnings
from typing import Any

from edge_slm_bench.runners.base import Float32, Spec
from edge_slm_bench.runners.greedy import GreedyRunner, Int64
from edge_slm_runtime.engines.base import first_line
from edge_slm_runtime.errors import DependencyMissing, EngineError

FILES = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}


def open(spec: Spec, threads: int) -> OptimumRunner:  # noqa: A001
    """Raises DependencyMissing, EngineError."""
    with warnings.catch_warnings():  # the packages' own
        warnings.simplefilter("ignore")
        try:
            import onnxruntime
            import torch
            from optimum.onnxruntime import ORTModelForCausalLM
        except ImportError:
            raise DependencyMissing(
                "optimum is not installed", "pip install 'edge-slm[peers]'"
            ) from None
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            model = ORTModelForCausalLM.from_pretrained(
                spec.path, file_name=FILES[spec.precision], session_options=options
            )
        except Exception as error:  # onnxruntime has one exception class per status code
            raise EngineError(f"optimum cannot load {spec.path}: {first_line(error)}") from None
    return OptimumRunner(model)


class OptimumRunner(GreedyRunner):
    def __init__(self, model: Any) -> None:
        self._model = model
        self._past: Any = None
        self._seen = 0

    def reset(self, rows: int, prompt_tokens: int) -> None:
        self._past, self._seen = None, 0

    def step(self, ids: Int64, *, every: bool = False) -> Float32:
        import torch

        rows, width = ids.shape
        self._seen += width
        with torch.inference_mode():
            output = self._model(
                torch.from_numpy(ids),
                attention_mask=torch.ones((rows, self._seen), dtype=torch.int64),
                past_key_values=self._past,
                use_cache=True,
            )
        self._past = output.past_key_values
        logits: Float32 = output.logits.numpy()
        return logits if every else logits[:, -1:]
