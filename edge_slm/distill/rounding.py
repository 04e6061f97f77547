"""Training with the weights that will ship: int4, rounded anew in every step.

The pass is computed with rounded weights and the gradient is applied to those in float
(straight-through: Bengio et al., arXiv 1308.3432), so that the model learns to live with the
rounding of its quantised form. The blocks are the converters' own, rounded to nearest; GPTQ and
the choice of bits come on top when the model is converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BLOCK = 64  # inputs that share a scale; the converters choose 32, 64 or 128
TOP_LEVEL = 15


def matrices(lm: torch.nn.Module) -> list[tuple[torch.nn.Parameter, bool]]:
    """The weights of its layers, each with whether inputs are its first axis (as in GPT-2's).

    Without the embedding and the head, which ship with 8 bits.
    """
    from transformers.pytorch_utils import Conv1D

    return [
        (module.weight, isinstance(module, Conv1D))
        for module in lm.base_model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]


@contextmanager
def rounded(lm: torch.nn.Module) -> Iterator[None]:
    """Inside, the layers of `lm` have rounded weights; afterwards their own again, which an
    optimizer may then change by the gradients."""
    kept = [(weight, weight.detach().clone()) for weight, _ in matrices(lm)]
    try:
        with torch.no_grad():
            for weight, inputs_first in matrices(lm):
                values = weight.data.T if inputs_first else weight.data
                values.copy_(nearest(values))
        yield
    finally:
        for weight, before in kept:
            weight.data.copy_(before)


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [outputs, inputs] as 4 bits in blocks give it back: `blocks.nearest` of the
    converters with the range of a block as it is."""
    inputs = weight.shape[1]
    blocks = torch.nn.functional.pad(weight, (0, -inputs % BLOCK)).unflatten(1, (-1, BLOCK))
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    high = blocks.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / TOP_LEVEL
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round().clamp(0, TOP_LEVEL)
    steps = _steps(blocks, scale, zero)
    fitted = (blocks * steps).sum(-1, keepdim=True)
    scale = torch.where(fitted > 0, fitted / steps.square().sum(-1, keepdim=True), scale)
    return (_steps(blocks, scale, zero) * scale).flatten(1)[:, :inputs]


def _steps(blocks: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Level − zero."""
    return (blocks / scale).round().clamp(-zero, TOP_LEVEL - zero)
