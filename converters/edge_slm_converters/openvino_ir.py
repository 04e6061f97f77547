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
        x = ops.add(
            ops.gather(self._weight("embedding"), self._ids, self._ints(0)),
            ops.gather(self._weight("positions"), self._positions, self._ints(0)),
        )
        mask, empty = self._mask(), self._empty_cache()
        for i in range(decoder.layers):
            here = f"layers.{i}"
            normed = self._norm(x, f"{here}.attention_norm")
            x = ops.add(x, self._attention(normed, i, mask, empty))
            inner = self._linear(self._norm(x, f"{here}.mlp_norm"), f"{here}.up")
            x = ops.add(x, self._linear(self._activation(inner), f"{here}.down"))
        x = ops.gather(self._norm(x, "final_norm"), self._keep, self._ints(1))
        head = self._weight("embedding" if decoder.tied else "head.weight")
        logits = ops.result(ops.matmul(x, head, False, True))
        logits.output(0).set_names({"logits"})
        inputs = [self._ids, self._positions, self._keep, self._beams]
        return self._model([logits], self._assigned, inputs, decoder.architecture)

    def _attention(self, x: Any, layer: int, mask: Any, empty: Any) -> Any:
        ops, decoder = self._ops, self._decoder
        joined = self._linear(x, f"layers.{layer}.qkv")
        query, key, value = (
            self._by_head(part) for part in ops.split(joined, self._ints(-1), 3).outputs()
        )
        mixed = ops.scaled_dot_product_attention(
            query,
            self._cached(key, f"key.{layer}", empty),
            self._cached(value, f"value.{layer}", empty),
            mask,
            ops.constant(decoder.attention_scale[layer], np.float32),
            causal=False,
        )
        rows = ops.transpose(mixed, self._ints(0, 2, 1, 3))
        rows = ops.reshape(rows, self._ints(0, 0, decoder.attention_width), True)
        return self._linear(rows, f"layers.{layer}.out")

    def _by_head(self, x: Any) -> Any:
        """[B,S,width] → [B,heads,S,head width]."""
        shape = self._ints(0, 0, self._decoder.heads, self._decoder.head_width)
        return self._ops.transpose(self._ops.reshape(x, shape, True), self._ints(0, 2, 1, 3))

    def _cached(self, new: Any, name: str, empty: Any) -> Any:
        """The cache with `new` at its end, which is also what the next step finds."""
        shape = [-1, self._decoder.heads, -1, self._decoder.head_width]
        past = self._ops.read_value(empty, name, np.float32, shape)
        past = self._ops.gather(past, self._beams, self._ints(0))
        whole = self._ops.concat([past, new], 2)
        self._assigned.append(self._ops.assign(whole, name))
        return whole

    def _empty_cache(self) -> Any:
        """[B,heads,0,head width], the cache before the first step."""
        ops = self._ops
        rows = ops.gather(ops.shape_of(self._ids), self._ints([0]), self._ints(0))
        shape = ops.concat([rows, self._ints(self._decoder.heads, 0, self._decoder.head_width)], 0)
        return ops.broadcast(ops.constant(0, np.float32), shape)

    def _mask(self) -> Any:
        """[B,1,S,T]: 0 where a position may look, -inf at later ones."""
        ops = self._ops
        last = ops.reduce_max(self._positions, self._ints(0, 1))
        seen = ops.range(self._ints(0), ops.add(last, self._ints(1)), self._ints(1), "i64")
        hidden = ops.greater(seen, ops.unsqueeze(self._positions, self._ints(1, 3)))
        return ops.select(hidden, ops.constant(-np.inf, np.float32), ops.constant(0, np.float32))

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
        normed = ops.mvn(x, self._ints([-1]), True, epsilon, "inside_sqrt")
        return ops.add(
            ops.multiply(normed, self._weight(f"{name}.weight")), self._weight(f"{name}.bias")
        )

    def _linear(self, x: Any, name: str) -> Any:
        weight = self._constant(self._tensors[f"{name}.weight"].T, f"{name}.weight")
        return self._ops.add(self._ops.matmul(x, weight, False, True), self._weight(f"{name}.bias"))

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
