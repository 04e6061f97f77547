"""Writes an OpenVINO model from numpy arrays, in the form that its CPU plugin fuses.

That is what optimum-intel and OpenVINO GenAI run: one ScaledDotProductAttention a
layer and a KV cache inside the model, which become one operator, and an LM head that
sees only the positions asked for. Written directly, because a graph that comes by way
of ONNX has its attention in pieces (measured: 1.2 to 1.5 times slower per token), and
because this needs no torch.

Inputs: input_ids and position_ids [B,S] int64; `keep` [K] int64, the positions (of
0…S-1) whose logits are wanted; beam_idx [B] int32, which row of the cache each row goes
on from. Output: logits [B,K,V].
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_bench.runners.openvino import MODEL, import_openvino
from edge_slm_converters.arrays import Float32
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.quantise import step_bytes
from edge_slm_runtime.errors import DependencyMissing


def write_openvino(checkpoint: Checkpoint, precision: str, folder: Path) -> int:
    """Writes `folder/openvino_model.xml` and `.bin`.

    precision: "fp32", or "int8" as nncf compresses weights: 8 bits with a scale and a zero
    point per output row, activations quantised as it runs. Returns the bytes of matrices
    that one decoding step reads. Raises DependencyMissing.
    """
    openvino = import_openvino()
    model = _Graph(checkpoint).model()
    if precision == "int8":
        try:
            import nncf
        except ImportError:
            raise DependencyMissing(
                "int8 for OpenVINO needs nncf", "pip install 'edge-slm[peers]'"
            ) from None
        nncf.set_log_level(logging.ERROR)
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    return step_bytes(checkpoint.decoder, precision)


class _Graph:
    """Builds the model node by node; `x` is [B,S,width] throughout."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        openvino = import_openvino()
        self._model, self._ops = openvino.Model, openvino.opset13
        self._decoder, self._tensors = checkpoint.decoder, checkpoint.tensors
        self._constants: dict[str, Any] = {}
        self._ids = self._parameter("input_ids", 2, np.int64)
        self._positions = self._parameter("position_ids", 2, np.int64)
        self._keep = self._parameter("keep", 1, np.int64)
        self._beams = self._parameter("beam_idx", 1, np.int32)
        self._assigned: list[Any] = []

    def model(self) -> Any:
        ops, decoder = self._ops, self._decoder
        x = ops.gather(self._weight("embedding"), self._ids, self._ints(0))
        if decoder.position == "learned":
            places = ops.gather(self._weight("positions"), self._positions, self._ints(0))
            x = ops.add(x, places)
        mask, empty, rotary = self._mask(), self._empty_cache(), self._rotary_tables()
        for i in range(decoder.layers):
            here = f"layers.{i}"
            normed = self._norm(x, f"{here}.attention_norm")
            x = ops.add(x, self._attention(normed, i, mask, empty, rotary))
            normed = self._norm(x, f"{here}.mlp_norm")
            x = ops.add(x, self._linear(self._inner(normed, f"{here}.up"), f"{here}.down"))
        x = ops.gather(self._norm(x, "final_norm"), self._keep, self._ints(1))
        head = self._weight("embedding" if decoder.tied else "head.weight")
        logits = ops.result(ops.matmul(x, head, False, True))
        logits.output(0).set_names({"logits"})
        inputs = [self._ids, self._positions, self._keep, self._beams]
        return self._model([logits], self._assigned, inputs, decoder.architecture)

    def _attention(self, x: Any, layer: int, mask: Any, empty: Any, rotary: Any) -> Any:
        ops, d = self._ops, self._decoder
        joined = self._linear(x, f"layers.{layer}.qkv")
        widths = self._ints(d.attention_width, d.kv_width, d.kv_width)
        query, key, value = (
            self._by_head(part, heads)
            for part, heads in zip(
                ops.variadic_split(joined, self._ints(-1), widths).outputs(),
                (d.heads, d.kv_heads, d.kv_heads),
                strict=True,
            )
        )
        if rotary:
            query, key = self._rotated(query, *rotary), self._rotated(key, *rotary)
        mixed = ops.scaled_dot_product_attention(
            query,
            self._for_all_heads(self._cached(key, f"key.{layer}", empty)),
            self._for_all_heads(self._cached(value, f"value.{layer}", empty)),
            mask,
            ops.constant(d.attention_scale[layer], np.float32),
            causal=False,
        )
        rows = ops.transpose(mixed, self._ints(0, 2, 1, 3))
        rows = ops.reshape(rows, self._ints(0, 0, d.attention_width), True)
        return self._linear(rows, f"layers.{layer}.out")

    def _by_head(self, x: Any, heads: int) -> Any:
        """[B,S,heads × head width] → [B,heads,S,head width]."""
        shape = self._ints(0, 0, heads, self._decoder.head_width)
        return self._ops.transpose(self._ops.reshape(x, shape, True), self._ints(0, 2, 1, 3))

    def _cached(self, new: Any, name: str, empty: Any) -> Any:
        """The cache with `new` at its end, which the next step starts from."""
        shape = [-1, self._decoder.kv_heads, -1, self._decoder.head_width]
        past = self._ops.read_value(empty, name, np.float32, shape)
        past = self._ops.gather(past, self._beams, self._ints(0))
        whole = self._ops.concat([past, new], 2)
        self._assigned.append(self._ops.assign(whole, name))
        return whole

    def _empty_cache(self) -> Any:
        """[B,key-value heads,0,head width], the cache before the first step."""
        ops, d = self._ops, self._decoder
        rows = ops.gather(ops.shape_of(self._ids), self._ints([0]), self._ints(0))
        shape = ops.concat([rows, self._ints(d.kv_heads, 0, d.head_width)], 0)
        return ops.broadcast(ops.constant(0, np.float32), shape)

    def _for_all_heads(self, cache: Any) -> Any:
        """Keys or values [B,key-value heads,T,head width] for every query head that reads
        them: the pattern that the plugin takes into its attention operator."""
        ops, d = self._ops, self._decoder
        if d.kv_heads == d.heads:
            return cache
        each = self._ints(1, 1, d.heads // d.kv_heads, 1, 1)
        wide = ops.broadcast(
            ops.unsqueeze(cache, self._ints(2)), each, broadcast_spec="BIDIRECTIONAL"
        )
        return ops.reshape(wide, self._ints(0, d.heads, -1, d.head_width), True)

    def _rotary_tables(self) -> tuple[Any, Any] | None:
        """Cosines and sines of the positions, [B,1,S,head width]."""
        if self._decoder.position != "rotary":
            return None
        ops, (cos, sin) = self._ops, self._decoder.rotary_table()
        tables = []
        for name, table in (("cos", cos), ("sin", sin)):
            both = self._constant(np.concatenate([table, table], -1), f"rotary.{name}")
            rows = ops.gather(both, self._positions, self._ints(0))
            tables.append(ops.unsqueeze(rows, self._ints(1)))
        return tables[0], tables[1]

    def _rotated(self, x: Any, cos: Any, sin: Any) -> Any:
        """Queries or keys [B,heads,S,head width], each turned by its position."""
        ops, half = self._ops, self._decoder.head_width // 2
        first, second = ops.variadic_split(x, self._ints(3), self._ints(half, half)).outputs()
        turned = ops.concat([ops.multiply(second, ops.constant(-1, np.float32)), first], -1)
        return ops.add(ops.multiply(x, cos), ops.multiply(turned, sin))

    def _mask(self) -> Any:
        """[B,1,S,T]: 0 where a position may look, -inf at later ones."""
        ops = self._ops
        last = ops.reduce_max(self._positions, self._ints(0, 1))
        seen = ops.range(self._ints(0), ops.add(last, self._ints(1)), self._ints(1), "i64")
        hidden = ops.greater(seen, ops.unsqueeze(self._positions, self._ints(1, 3)))
        return ops.select(hidden, ops.constant(-np.inf, np.float32), ops.constant(0, np.float32))

    def _inner(self, x: Any, name: str) -> Any:
        """The input of the feed-forward layer's second matrix."""
        up = self._linear(x, name)
        if self._decoder.mlp == "plain":
            return self._activation(up)
        gate, up = self._ops.split(up, self._ints(-1), 2).outputs()
        return self._ops.multiply(self._activation(gate), up)

    def _activation(self, x: Any) -> Any:
        match self._decoder.activation:
            case "gelu_tanh":
                return self._ops.gelu(x, "tanh")
            case "gelu":
                return self._ops.gelu(x, "erf")
            case "silu":
                return self._ops.swish(x)
            case name:
                return getattr(self._ops, name)(x)

    def _norm(self, x: Any, name: str) -> Any:
        ops, epsilon = self._ops, self._decoder.norm_epsilon
        if self._decoder.norm == "rms":
            square = ops.power(x, ops.constant(2, np.float32))
            mean = ops.reduce_mean(square, self._ints([-1]), True)
            root = ops.sqrt(ops.add(mean, ops.constant(epsilon, np.float32)))
            normed = ops.multiply(x, ops.divide(ops.constant(1, np.float32), root))
            return ops.multiply(normed, self._weight(f"{name}.weight"))
        normed = ops.mvn(x, self._ints([-1]), True, epsilon, "inside_sqrt")
        return ops.add(
            ops.multiply(normed, self._weight(f"{name}.weight")), self._weight(f"{name}.bias")
        )

    def _linear(self, x: Any, name: str) -> Any:
        weight = self._constant(self._tensors[f"{name}.weight"].T, f"{name}.weight")
        y = self._ops.matmul(x, weight, False, True)
        if not self._tensors[f"{name}.bias"].any():
            return y
        return self._ops.add(y, self._weight(f"{name}.bias"))

    def _weight(self, name: str) -> Any:
        """One node for a tensor however often it is used: a tied embedding is stored once."""
        if name not in self._constants:
            self._constants[name] = self._constant(self._tensors[name], name)
        return self._constants[name]

    def _constant(self, value: Float32, name: str) -> Any:
        return self._ops.constant(np.ascontiguousarray(value), name=name)

    def _ints(self, *values: Any) -> Any:
        """A constant: a scalar for one number, else a list."""
        return self._ops.constant(np.array(values[0] if len(values) == 1 else values, np.int64))

    def _parameter(self, name: str, rank: int, kind: Any) -> Any:
        node = self._ops.parameter([-1] * rank, kind, name)
        node.output(0).set_names({name})
        return node
