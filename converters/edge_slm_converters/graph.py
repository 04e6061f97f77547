"""A decoder as an ONNX graph of onnxruntime's fused operators.

The graph reads like the model: embed, then per layer attention and feed-forward,
each added to the residual and normalised, then the LM head on the last position.
Every sum of residual, output and bias is one `SkipLayerNormalization` (of RMS norms
`SkipSimplifiedLayerNormalization`), which also hands on the new residual.

inputs   input_ids int64 [B,S], position_ids int64 [B,S], seqlens_k int32 [B]
         (tokens of the row so far, minus one), total_sequence_length int32 [],
         past_key_values.{i}.key/value float32 [B,H,T,HD]
outputs  logits float32 [B,1,V], present.{i}.key/value float32 [B,H,T,HD]

T is the capacity of the KV cache: bind the same buffers as past and present, and
each call writes its S new positions in place.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.onnx_writer import (
    DATA_FILE,
    FUSED,
    MODEL_FILE,
    GraphWriter,
    import_onnx,
)
from edge_slm_converters.quantise import PRECISIONS, Precision, step_bytes, stored_bytes
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError
from edge_slm_runtime.panels import stored_name

LAST_POSITION = ("last.attention", "last.residual")  # the nodes that keep only one position
HEAD_WIDTH_STEP = {"learned": 8, "rotary": 16}  # GroupQueryAttention's conditions


def write_graph(checkpoint: Checkpoint, precision: str | Precision, folder: Path) -> int:
    """Writes `folder/model.onnx` and its `model.data`.

    precision: one of `PRECISIONS`, or of `bit_allocation`. Returns the bytes of weights that one
    decoding step reads. Raises CheckpointError for a shape that the operators cannot
    run, DependencyMissing.
    """
    decoder = checkpoint.decoder
    if isinstance(precision, str):
        precision = PRECISIONS[precision]
    if decoder.head_width % (step := HEAD_WIDTH_STEP[decoder.position]):
        raise CheckpointError(
            f"heads {decoder.head_width} wide cannot be converted to ONNX",
            f"a head's width must be a multiple of {step}",
        )
    graph = GraphWriter(folder)
    DecoderGraph(checkpoint, precision, graph).build()
    graph.save(decoder.architecture)
    _check(decoder, precision, graph)
    return step_bytes(decoder, precision)


def write_all_logits(folder: Path) -> Path:
    """Writes, next to `model.onnx` and with the same weights, the graph whose logits are
    [B,S,V], one row per position: fidelity is measured on them."""
    onnx = import_onnx()
    model = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
    for node in model.graph.node:
        if node.name in LAST_POSITION:
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "S"
    path = folder / "all_logits.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


class DecoderGraph:
    """Adds a checkpoint's nodes and weights to a graph writer."""

    def __init__(self, checkpoint: Checkpoint, precision: Precision, graph: GraphWriter) -> None:
        self.decoder, self.tensors = checkpoint.decoder, checkpoint.tensors
        self.head = checkpoint.head
        self.precision, self.graph = precision, graph

    def build(self) -> None:
        decoder, graph = self.decoder, self.graph
        ids = graph.input("input_ids", np.int64, ["B", "S"])
        positions = graph.input("position_ids", np.int64, ["B", "S"])
        graph.input("seqlens_k", np.int32, ["B"])
        graph.input("total_sequence_length", np.int32, [])
        graph.output("logits", np.float32, ["B", 1, decoder.vocab_size])

        token = self.precision.embed(graph, ids, "embedding", self.tensors["embedding"])
        first = "layers.0.attention_norm"
        if decoder.position == "learned":
            table = self.weight("positions", "wpe.weight")
            position = graph.node("Gather", [table, positions], "wpe")
            x, residual = self.add_and_norm(token, position, first)
        else:
            x, residual = self.norm(token, first), token
        for i in range(decoder.layers):
            x = self.attention(i, x)
            if i == decoder.layers - 1:  # only the last position is asked for from here on
                last = graph.indices(-1)
                x = graph.node("Gather", [x, last], LAST_POSITION[0], axis=1)
                residual = graph.node("Gather", [residual, last], LAST_POSITION[1], axis=1)
            x = self.linear(x, f"layers.{i}.out")
            x, residual = self.add_and_norm(x, residual, f"layers.{i}.mlp_norm", f"layers.{i}.out")
            x = self.feed_forward(i, x)
            last_layer = i + 1 == decoder.layers
            norm = "final_norm" if last_layer else f"layers.{i + 1}.attention_norm"
            x, residual = self.add_and_norm(x, residual, norm, f"layers.{i}.down")
        logits = self.precision.head(graph, x, "head", self.head)
        graph.node("Identity", [logits], "logits")

    def attention(self, i: int, x: str) -> str:
        """Causal self-attention over the cache; of q, k, v side by side."""
        decoder, graph = self.decoder, self.graph
        qkv = self.linear(x, f"layers.{i}.qkv")
        qkv = self.add(qkv, self.bias(f"layers.{i}.qkv"), f"h.{i}.attn.qkv")
        shape: list[int | str] = ["B", decoder.kv_heads, "T", decoder.head_width]
        parts = ("key", "value")
        past = [graph.input(f"past_key_values.{i}.{p}", np.float32, shape) for p in parts]
        present = [graph.output(f"present.{i}.{p}", np.float32, shape) for p in parts]
        return graph.node(
            "GroupQueryAttention",
            [qkv, "", "", *past, "seqlens_k", "total_sequence_length", *self.rotary()],
            [f"h.{i}.attn", *present],
            FUSED,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            scale=decoder.attention_scale[i],
            **({"do_rotary": 1} if decoder.position == "rotary" else {}),
        )

    def rotary(self) -> list[str]:
        """Cosines and sines of every position, which the layers share, and the positions."""
        if self.decoder.position != "rotary":
            return []
        tables = zip(("rotary.cos", "rotary.sin"), self.decoder.rotary_table(), strict=True)
        return [*(self.graph.shared(name, table) for name, table in tables), "position_ids"]

    def feed_forward(self, i: int, x: str) -> str:
        x, bias = self.linear(x, f"layers.{i}.up"), self.bias(f"layers.{i}.up")
        if self.decoder.mlp == "gated":
            x = self.add(x, bias, f"h.{i}.mlp.both")
            parts = [f"h.{i}.mlp.gate", f"h.{i}.mlp.up"]
            self.graph.node("Split", [x], parts, axis=-1, num_outputs=2)
            gate = self.activation(parts[0], None, f"h.{i}.mlp.act")
            x = self.graph.node("Mul", [gate, parts[1]], f"h.{i}.mlp.gated")
        else:
            x = self.activation(x, bias, f"h.{i}.mlp.act")
        return self.linear(x, f"layers.{i}.down")

    def activation(self, x: str, bias: str | None, name: str) -> str:
        """The decoder's activation of x + bias."""
        graph, kind = self.graph, self.decoder.activation
        if kind == "gelu_tanh":
            return graph.node("FastGelu", [x, bias] if bias else [x], name, FUSED)
        if kind == "gelu":
            if bias:
                return graph.node("BiasGelu", [x, bias], name, FUSED)
            return graph.node("Gelu", [x], name, FUSED)
        x = self.add(x, bias, f"{name}.in")
        if kind == "silu":
            share = graph.node("Sigmoid", [x], f"{name}.gate")
            return graph.node("Mul", [x, share], name)
        return graph.node({"relu": "Relu", "tanh": "Tanh"}[kind], [x], name)

    def norm(self, x: str, norm: str) -> str:
        """The normalised x."""
        op = (
            "LayerNormalization" if self.decoder.norm == "layer" else "SimplifiedLayerNormalization"
        )
        inputs = [x, *self.norm_weights(norm)]
        epsilon = self.decoder.norm_epsilon
        return self.graph.node(op, inputs, stored_name(norm), axis=-1, epsilon=epsilon)

    def add_and_norm(
        self, x: str, residual: str, norm: str, linear: str | None = None
    ) -> tuple[str, str]:
        """(the normalised sum, the sum) of x, the bias of `linear`, whose output x is, and the
        residual."""
        inputs = [x, residual, *self.norm_weights(norm)]
        if linear and (bias := self.bias(linear)):
            inputs.append(bias)
        name = stored_name(norm)
        total = f"{name}.residual"
        simplified = "" if self.decoder.norm == "layer" else "Simplified"
        out = self.graph.node(
            f"Skip{simplified}LayerNormalization",
            inputs,
            [name] if norm == "final_norm" else [name, "", "", total],
            FUSED,
            epsilon=self.decoder.norm_epsilon,
        )
        return out, total

    def norm_weights(self, norm: str) -> list[str]:
        parts = ("weight", "bias") if self.decoder.norm == "layer" else ("weight",)
        return [self.weight(f"{norm}.{part}") for part in parts]

    def add(self, x: str, bias: str | None, name: str) -> str:
        return self.graph.node("Add", [x, bias], name) if bias else x

    def bias(self, linear: str) -> str | None:
        """The bias of a linear layer; None where a model without biases has zeros."""
        name = f"{linear}.bias"
        if self.decoder.norm == "rms" and not self.tensors[name].any():
            return None
        return self.weight(name)

    def linear(self, x: str, name: str) -> str:
        return self.precision.linear(self.graph, x, name, self.tensors[f"{name}.weight"])

    def weight(self, name: str, stored: str | None = None) -> str:
        return self.graph.constant(stored or stored_name(name), self.tensors[name])


def _check(decoder: Decoder, precision: Precision, graph: GraphWriter) -> None:
    """Every matrix was written in its precision, and none was stored twice."""
    quantised, expected = graph.operators[precision.operator], 4 * decoder.layers + 1
    if quantised != expected:
        raise AssertionError(f"{quantised} matrices are {precision.name}, not {expected}")
    if graph.weight_bytes > (most := stored_bytes(decoder, precision)):
        raise AssertionError(f"{DATA_FILE} has {graph.weight_bytes} bytes of weights, not {most}")
