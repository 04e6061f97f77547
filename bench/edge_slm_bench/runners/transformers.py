"""transformers on torch, in this process: eager float32, and torch's dynamic int8.

Fused (sdpa) attention where it computes the model's own scale, a `DynamicCache`, inference
mode, the LM head on the last position alone, `threads` for everything. For int8 every
matrix and the LM head becomes torch's dynamically quantised Linear, a scale per output;
the quantiser looks for `Linear` and would pass over GPT-2's `Conv1D`, which is replaced
before.
"""

from __future__ import annotations

import warnings
from typing import Any

from edge_slm_bench.runners.base import Float32, Spec
from edge_slm_bench.runners.greedy import GreedyRunner, Int64
from edge_slm_runtime.engines.base import first_line
from edge_slm_runtime.errors import DependencyMissing, EngineError


def open(spec: Spec, threads: int) -> TransformersRunner:  # noqa: A001
    """Raises DependencyMissing, EngineError."""
    with warnings.catch_warnings():  # the packages' own: what is deprecated there, swig
        warnings.simplefilter("ignore")
        try:
            import torch
            import transformers
        except ImportError:
            raise DependencyMissing(
                "torch and transformers are not installed", "pip install 'edge-slm[peers]'"
            ) from None
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        try:
            model = _model(spec.path)
        except (OSError, ValueError) as error:
            raise EngineError(
                f"transformers cannot load {spec.path}: {first_line(error)}"
            ) from None
        if spec.precision == "int8":
            model = _quantised(model)
    return TransformersRunner(model)


def _model(path: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    # sdpa ignores the two settings of GPT-2 that change the scale of attention
    plain = getattr(config, "scale_attn_weights", True) and not getattr(
        config, "scale_attn_by_inverse_layer_idx", False
    )
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa" if plain else "eager"
    ).eval()


def _quantised(model: Any) -> Any:
    """Raises EngineError when a matrix stayed in float32."""
    from torch import nn
    from torch.ao import quantization
    from torch.ao.nn.quantized.dynamic import Linear as QuantisedLinear
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight = nn.Parameter(child.weight.T.contiguous(), requires_grad=False)
                linear.bias = child.bias
                setattr(module, name, linear)
    expected = sum(isinstance(module, nn.Linear) for module in model.modules())
    settings = {nn.Linear: quantization.per_channel_dynamic_qconfig}
    model = quantization.quantize_dynamic(model, settings, inplace=True)
    done = sum(isinstance(module, QuantisedLinear) for module in model.modules())
    if done != expected:
        raise EngineError(f"torch quantised {done} matrices, not {expected}")
    return model


class TransformersRunner(GreedyRunner):
    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def reset(self, rows: int, prompt_tokens: int) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def step(self, ids: Int64, *, every: bool = False) -> Float32:
        import torch

        with torch.inference_mode():
            logits: Float32 = self._model(
                torch.from_numpy(ids),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if every else 1,
            ).logits.numpy()
        return logits
