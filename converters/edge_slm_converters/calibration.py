"""The model's own forward pass, in numpy: the inputs that its matrices get in use.

Conversion does without torch, and the graph that ships hands out neither the inputs of a
matrix nor a place to swap one, so the model is computed here once more, a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from edge_slm_bench.metrics.examples import Scored
from edge_slm_converters.arrays import Float32
from edge_slm_runtime.decoder import Decoder

CACHED_ROWS = 16

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
        self._rotary = decoder.rotary_table() if decoder.position == "rotary" else ()
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
        if self.decoder.position == "learned":
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
        up = linear(f"{here}up", self._norm(x, f"{here}mlp_norm"), None)
        return linear(f"{here}down", self._inner(up), x)

    def logits(self, x: Float32, head: Float32) -> Float32:
        """[rows, V], with `head` [V,width]."""
        logits: Float32 = self._norm(x[self.rows], "final_norm") @ head.T
        return logits

    def _inner(self, up: Float32) -> Float32:
        """The activation of [T, inner]; of a gated layer's [T, 2 × inner], times the second
        half."""
        activation, inner = ACTIVATIONS[self.decoder.activation], self.decoder.inner
        inner_rows = np.empty((len(up), inner), np.float32)
        for rows in pieces(len(up)):
            inner_rows[rows] = activation(up[rows, :inner])
            if self.decoder.mlp == "gated":
                inner_rows[rows] *= up[rows, inner:]
        return inner_rows

    def _attention(self, i: int, qkv: Float32) -> Float32:
        """Causal, within each text; a key-value head serves heads / kv_heads query heads."""
        d = self.decoder
        mixed = np.empty((len(qkv), d.attention_width), np.float32)
        for start, end in self._spans:
            length = end - start
            heads = qkv[start:end].reshape(length, -1, d.head_width).swapaxes(0, 1)
            query, key, value = np.split(heads, [d.heads, d.heads + d.kv_heads])
            if d.position == "rotary":
                query, key = self._rotated(query), self._rotated(key)
            query = query.reshape(d.kv_heads, -1, d.head_width)
            score = query @ key.swapaxes(1, 2) * np.float32(d.attention_scale[i])
            score = score.reshape(d.heads, length, length)
            score[:, ~np.tri(length, dtype=bool)] = -np.inf
            share = np.exp(score - score.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            heads = share.reshape(d.kv_heads, -1, length) @ value
            heads = heads.reshape(d.heads, length, d.head_width)
            mixed[start:end] = heads.swapaxes(0, 1).reshape(length, -1)
        return mixed

    def _rotated(self, heads: Float32) -> Float32:
        """Queries or keys [heads, positions, head width], each turned by its position."""
        cos, sin = (table[: heads.shape[1]] for table in self._rotary)
        first, second = np.split(heads, 2, -1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def _norm(self, x: Float32, name: str) -> Float32:
        if self.decoder.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        variance = np.square(x).mean(-1, keepdims=True)
        x = x / np.sqrt(variance + np.float32(self.decoder.norm_epsilon))
        x *= self._tensors[f"{name}.weight"]
        if self.decoder.norm == "layer":
            x += self._tensors[f"{name}.bias"]
        return x


def pieces(rows: int) -> Iterator[slice]:
    """Slices of a few rows, whose intermediate results stay in the processor's cache."""
    for start in range(0, rows, CACHED_ROWS):
        yield slice(start, start + CACHED_ROWS)


def output(x: Float32, matrix: Float32, bias: Float32, residual: Float32 | None) -> Float32:
    """residual + x · matrix + bias; without a residual it counts as 0."""
    y: Float32 = x @ matrix
    y += bias
    if residual is not None:
        y += residual
    return y


def _gelu_tanh(x: Float32) -> Float32:
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
    inner: Float32 = np.float32(0.044715) * x
    inner *= x
    inner *= x
    inner += x
    inner *= np.float32(math.sqrt(2 / math.pi))
    np.tanh(inner, out=inner)
    inner += 1
    inner *= np.float32(0.5) * x
    return inner


ACTIVATIONS: Mapping[str, Callable[[Float32], Float32]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu_tanh,  # within 0.0005: near enough for statistics, and numpy has no erf
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}
