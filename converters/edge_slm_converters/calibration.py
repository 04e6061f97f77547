"""The model's own forward pass, in numpy: what its matrices see in use.

Conversion does without torch, and the graph that ships hands out neither the inputs of a
matrix nor a place to swap one, so the model is computed here once more, a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edge_slm_bench.metrics.examples import Scored
from edge_slm_converters.arrays import Float32
from edge_slm_runtime.decoder import Decoder

# (name of a matrix, its inputs [T,K], the residual [T,N] that its output is added to, if any)
# → output [T,N], bias and residual included
Linear = Callable[[str, Float32, Float32 | None], Float32]


class ForwardPass:
    """A decoder over several texts at once; x is [T,width], the positions of all texts in a row.

    rows: the positions that predict a response.
    """

    def __init__(
        self, decoder: Decoder, tensors: Mapping[str, Float32], texts: Sequence[Scored]
    ) -> None:
        self.decoder, self._tensors = decoder, tensors
        self._ids = np.concatenate([text.ids for text in texts])
        self._ends = np.cumsum([len(text.ids) for text in texts])
        starts = self._ends - [len(text.ids) for text in texts]
        self._spans = list(zip(starts, self._ends, strict=True))
        self.rows = np.concatenate(
            [
                np.arange(start + text.prompt - 1, end - 1)
                for text, (start, end) in zip(texts, self._spans, strict=True)
            ]
        )

    def embedded(self) -> Float32:
        positions = np.concatenate([np.arange(end - start) for start, end in self._spans])
        x: Float32 = self._tensors["embedding"][self._ids]
        x += self._tensors["positions"][positions]
        return x

    def linear(self, name: str, x: Float32, residual: Float32 | None = None) -> Float32:
        return output(x, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"], residual)

    def layer(self, i: int, x: Float32, linear: Linear | None = None) -> Float32:
        """The residual after layer i; `linear` computes its four matrices in turn."""
        linear = linear or self.linear
        here = f"layers.{i}."
        qkv = linear(f"{here}qkv", self._norm(x, f"{here}attention_norm"), None)
        x = linear(f"{here}out", self._attention(i, qkv), x)
        inner = linear(f"{here}up", self._norm(x, f"{here}mlp_norm"), None)
        return linear(f"{here}down", ACTIVATIONS[self.decoder.activation](inner), x)

    def logits(self, x: Float32, head: Float32) -> Float32:
        """[rows, V], with `head` [V,width]."""
        logits: Float32 = self._norm(x[self.rows], "final_norm") @ head.T
        return logits

    def _attention(self, i: int, qkv: Float32) -> Float32:
        """Causal, within each text."""
        decoder = self.decoder
        mixed = np.empty((len(qkv), decoder.width), np.float32)
        for start, end in self._spans:
            parts = qkv[start:end].reshape(end - start, 3, decoder.heads, decoder.head_width)
            query, key, value = parts.transpose(1, 2, 0, 3)
            score = query @ key.transpose(0, 2, 1) * np.float32(decoder.attention_scale[i])
            score[:, ~np.tri(end - start, dtype=bool)] = -np.inf
            share = np.exp(score - score.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            mixed[start:end] = (share @ value).transpose(1, 0, 2).reshape(end - start, -1)
        return mixed

    def _norm(self, x: Float32, name: str) -> Float32:
        x = x - x.mean(-1, keepdims=True)
        variance = np.square(x).mean(-1, keepdims=True)
        x /= np.sqrt(variance + np.float32(self.decoder.norm_epsilon))
        return x * self._tensors[f"{name}.weight"] + self._tensors[f"{name}.bias"]


def output(x: Float32, matrix: Float32, bias: Float32, residual: Float32 | None) -> Float32:
    """residual + x · matrix + bias; without a residual it counts as 0."""
    y: Float32 = x @ matrix
    y += bias
    if residual is not None:
        y += residual
    return y


def _gelu_tanh(x: Float32) -> Float32:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    gelu: Float32 = np.float32(0.5) * x * (1 + np.tanh(inner))
    return gelu


ACTIVATIONS: Mapping[str, Callable[[Float32], Float32]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu_tanh,  # within 0.0005: near enough for statistics, and numpy has no erf
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}
