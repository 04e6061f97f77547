"""How a weight matrix is stored and multiplied, one class per precision.

| precision | weights | activations | operator |
|---|---|---|---|
| fp32 | float32 | float32 | FusedMatMul |
| int8 | 8-bit blocks of inputs | int8 inside it | MatMulNBits |
| int4 | 4-bit blocks; some matrices, the head in 8 bits | int8 inside it | MatMulNBits |

MatMulNBits rounds the activations of each row (position) block by block, so no row's scale
depends on another's. With 4-bit blocks of 64 and 128 its kernels still add in another order
for a lone row than for several, and a value that is then rounded otherwise may turn a near
tie: int4's answers in a batch are not always those of a single run. int8's are.

The embedding is always written from the same bytes as a tied LM head, so that
`GraphWriter` stores it once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from edge_slm_converters.arrays import Float32
from edge_slm_converters.blocks import Blocks, block_bytes, bytewise
from edge_slm_converters.onnx_writer import FUSED, GraphWriter
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.panels import stored_name

# Of 8-bit matrices. As fast as 128 and as many bytes as llama.cpp's Q8_0, and the largest for
# which the operator's kernels add in the same order however many rows there are: a token
# gets the same bits alone, in a prompt and in a batch.
BYTE_BLOCK = 64


class Precision(Protocol):
    """Adds one weight matrix to a graph. Shapes: x [B,S,K] → [B,S,N]. Names are canonical."""

    name: str
    operator: str  # what multiplies: four of them a layer, and the head

    def linear(self, graph: GraphWriter, x: str, name: str, weight: Float32) -> str:
        """x · weight, weight [K,N]."""

    def head(self, graph: GraphWriter, x: str, name: str, table: Float32) -> str:
        """x · tableᵀ, table [V,D]."""

    def embed(self, graph: GraphWriter, ids: str, name: str, table: Float32) -> str:
        """Rows of table [V,D] → [B,S,D], stored as `head` stores them."""

    def linear_bytes(self, name: str, inputs: int, outputs: int) -> int:
        """Bytes of the stored matrix `name` of a layer, scales included."""

    def head_bytes(self, width: int, vocab_size: int) -> int:
        """Bytes of the stored LM head or embedding."""


class Fp32:
    name, operator = "fp32", "FusedMatMul"

    def linear(self, graph: GraphWriter, x: str, name: str, weight: Float32) -> str:
        name = stored_name(name)
        return graph.node("FusedMatMul", [x, graph.constant(f"{name}.weight", weight)], name, FUSED)

    def head(self, graph: GraphWriter, x: str, name: str, table: Float32) -> str:
        name = stored_name(name)
        weight = graph.constant(f"{name}.weight", table)
        return graph.node("FusedMatMul", [x, weight], name, FUSED, transB=1)

    def embed(self, graph: GraphWriter, ids: str, name: str, table: Float32) -> str:
        name = stored_name(name)
        return graph.node("Gather", [graph.constant(f"{name}.weight", table), ids], name)

    def linear_bytes(self, name: str, inputs: int, outputs: int) -> int:
        return 4 * inputs * outputs

    def head_bytes(self, width: int, vocab_size: int) -> int:
        return 4 * width * vocab_size


class Quantised:
    """The matrices `blocks` as given, all others in 8 bits. LM head and embedding always are:
    they are a small part of the model and hold most of the error (measured on half-trained
    weights of the reference shape: KL 0.0014 instead of 0.0051 with 4 bits)."""

    operator = "MatMulNBits"

    def __init__(self, name: str, blocks: Mapping[str, Blocks] | None = None) -> None:
        self.name, self.blocks = name, blocks or {}

    def of(self, name: str, weight: Float32) -> Blocks:
        """Matrix `name`, of which `weight` [K,N] are the values, as it is stored."""
        return self.blocks.get(name) or bytewise(weight, BYTE_BLOCK)

    def linear(self, graph: GraphWriter, x: str, name: str, weight: Float32) -> str:
        blocks, name = self.of(name, weight), stored_name(name)
        parts = [graph.constant(f"{name}.{k}", part) for k, part in blocks.packed().items()]
        inputs, outputs = weight.shape
        return graph.node(
            self.operator,
            [x, *parts],
            name,
            FUSED,
            K=inputs,
            N=outputs,
            bits=blocks.bits,
            block_size=blocks.size,
            accuracy_level=4,  # int8 products; level 1 (fp32) is three times slower
        )

    def head(self, graph: GraphWriter, x: str, name: str, table: Float32) -> str:
        return self.linear(graph, x, name, table.T)

    def embed(self, graph: GraphWriter, ids: str, name: str, table: Float32) -> str:
        parts, name = bytewise(table.T, BYTE_BLOCK).packed(), stored_name(name)
        levels = parts["weight"].reshape(len(table), -1)
        weight = graph.constant(f"{name}.weight", levels)
        scale = graph.constant(f"{name}.scale", parts["scale"])
        rows = graph.node(
            "GatherBlockQuantized",
            [weight, ids, scale],
            f"{name}.rows",
            FUSED,
            bits=8,
            block_size=BYTE_BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
        # The last block may be longer than the width.
        ends = [graph.indices(n) for n in (0, table.shape[1], -1)]
        return graph.node("Slice", [rows, *ends], name)

    def linear_bytes(self, name: str, inputs: int, outputs: int) -> int:
        if blocks := self.blocks.get(name):
            return block_bytes(inputs, outputs, blocks.bits, blocks.size)
        return block_bytes(inputs, outputs, 8, BYTE_BLOCK)

    def head_bytes(self, width: int, vocab_size: int) -> int:
        return block_bytes(width, vocab_size, 8, BYTE_BLOCK)


# Those that need nothing but the weights; int4 is made by `bit_allocation`.
PRECISIONS: dict[str, Precision] = {p.name: p for p in (Fp32(), Quantised("int8"))}


def step_bytes(decoder: Decoder, precision: str | Precision) -> int:
    """Bytes of matrices that one decoding step reads, by formula."""
    p = PRECISIONS[precision] if isinstance(precision, str) else precision
    layers = sum(p.linear_bytes(name, k, n) for name, (k, n) in decoder.matrices().items())
    return layers + p.head_bytes(decoder.width, decoder.vocab_size)


def stored_bytes(decoder: Decoder, precision: Precision) -> int:
    """Bytes of all weights of a model, by formula: what a second copy of a tied
    embedding, or a matrix that was left in float32, would exceed."""
    values = sum(math.prod(shape) for shape in decoder.shapes().values())
    in_layers = sum(k * n for k, n in decoder.matrices().values())
    in_tables = (1 if decoder.tied else 2) * decoder.width * decoder.vocab_size
    rotary = decoder.positions * decoder.head_width if decoder.position == "rotary" else 0
    float32 = 4 * (values - in_layers - in_tables + rotary)
    embedding = precision.head_bytes(decoder.width, decoder.vocab_size)
    return step_bytes(decoder, precision) + float32 + (0 if decoder.tied else embedding)
