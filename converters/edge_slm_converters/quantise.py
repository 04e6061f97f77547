"""How a weight matrix is stored and multiplied, one class per precision.

| precision | weights | activations | operator |
|---|---|---|---|
| fp32 | float32 | float32 | FusedMatMul |
| int8 | int8, a scale per output | uint8 per row, made on the fly | MatMulInteger |
| int4 | 4-bit blocks of 32 inputs; head int8 | int8 inside the operator | MatMulNBits |

The embedding is always written from the same bytes as a tied LM head, so that
`GraphWriter` stores it once.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_slm_converters.checkpoint import Float32, GPT2Config
from edge_slm_converters.onnx_writer import FUSED, GraphWriter

Int8 = npt.NDArray[np.int8]
UInt8 = npt.NDArray[np.uint8]

# AVX2 without VNNI multiplies uint8 × int8 pairs into a *saturating* 16-bit sum:
# 2 · 255 · 127 overflows it. With weights to ±96 a pair overflows only when both
# activations are near their maximum, which costs less than the coarser steps of ±64
# (where nothing can overflow).
INT8_LIMIT = 96
# Activations are uint8 around 128, because int8 × int8 is not prepacked. What leaves a
# GELU is never below -0.17, so there the range is put where the values are. 16 is the best
# of 16, 32 and 48 in a simulation on 5,033 held-out tokens of the reference model: KL
# 0.00092 (128: 0.00128). Converted, top-1 agreement is 98.18% (128: 97.96%) on 9,822 tokens.
ACTIVATION_ZERO, ONE_SIDED_ZERO, ACTIVATION_MAX = 128, 16, 255
BLOCK = 32
INT4_LIMIT = 8
# Clip ratios tried when a 4-bit scale is chosen; 1 keeps the largest weight exact. Measured:
# KL falls by 12%. At 8 bits it changes nothing, so those scales are simply the maximum.
CLIP_RATIOS = np.linspace(0.8, 1.1, 7, dtype=np.float32)


class Precision(Protocol):
    """Adds one weight matrix to a graph. Shapes: x [B,S,K] → [B,S,N]."""

    name: str

    def linear(
        self, graph: GraphWriter, x: str, name: str, weight: Float32, one_sided: bool = False
    ) -> str:
        """x · weight, weight [K,N]. one_sided: x is hardly negative (it left a GELU)."""

    def head(self, graph: GraphWriter, x: str, name: str, table: Float32) -> str:
        """x · tableᵀ, table [V,D]."""

    def embed(self, graph: GraphWriter, ids: str, name: str, table: Float32) -> str:
        """Rows of table [V,D] → [B,S,D], stored as `head` stores them."""

    def multiplications(self, layers: int) -> dict[str, int]:
        """Operator → how many of them a graph has: four a layer, and the head."""

    def linear_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of one stored matrix of a layer, scales included."""

    def head_bytes(self, width: int, vocab_size: int) -> int:
        """Bytes of the stored LM head or embedding."""


class Fp32:
    name = "fp32"

    def linear(
        self, graph: GraphWriter, x: str, name: str, weight: Float32, one_sided: bool = False
    ) -> str:
        return graph.node("FusedMatMul", [x, graph.constant(f"{name}.weight", weight)], name, FUSED)

    def head(self, graph: GraphWriter, x: str, name: str, table: Float32) -> str:
        weight = graph.constant(f"{name}.weight", table)
        return graph.node("FusedMatMul", [x, weight], name, FUSED, transB=1)

    def embed(self, graph: GraphWriter, ids: str, name: str, table: Float32) -> str:
        return graph.node("Gather", [graph.constant(f"{name}.weight", table), ids], name)

    def multiplications(self, layers: int) -> dict[str, int]:
        return {"FusedMatMul": 4 * layers + 1}

    def linear_bytes(self, inputs: int, outputs: int) -> int:
        return 4 * inputs * outputs

    def head_bytes(self, width: int, vocab_size: int) -> int:
        return self.linear_bytes(width, vocab_size)


class Int8PerRow:
    """Activations get one scale per row (position), so a result depends neither on
    how a prompt was cut into chunks nor on its neighbours in the batch."""

    name = "int8"

    def linear(
        self, graph: GraphWriter, x: str, name: str, weight: Float32, one_sided: bool = False
    ) -> str:
        return self._multiply(
            graph, x, name, weight, ONE_SIDED_ZERO if one_sided else ACTIVATION_ZERO
        )

    def head(self, graph: GraphWriter, x: str, name: str, table: Float32) -> str:
        return self._multiply(graph, x, name, table.T, ACTIVATION_ZERO)

    def _multiply(self, graph: GraphWriter, x: str, name: str, weight: Float32, zero: int) -> str:
        row, row_scale = self._quantise_rows(graph, x, name, zero)
        quantised, scale = quantise_columns(weight)
        product = graph.node(
            "MatMulInteger",
            [
                row,
                graph.constant(f"{name}.weight", quantised),
                graph.scalar(zero, np.uint8),
            ],
            f"{name}.product",
        )
        product = graph.node("Cast", [product], f"{name}.float", to=1)
        product = graph.node("Mul", [product, row_scale], f"{name}.by_row")
        return graph.node("Mul", [product, graph.constant(f"{name}.scale", scale)], name)

    def embed(self, graph: GraphWriter, ids: str, name: str, table: Float32) -> str:
        # The head is stored [D,V], so an embedding is a column of it.
        quantised, scale = quantise_columns(table.T)
        weight = graph.constant(f"{name}.weight", quantised)
        columns = graph.node("Gather", [weight, ids], f"{name}.columns", axis=1)
        columns = graph.node("Transpose", [columns], f"{name}.rows", perm=[1, 2, 0])
        columns = graph.node("Cast", [columns], f"{name}.float", to=1)
        scales = graph.node("Gather", [graph.constant(f"{name}.scale", scale), ids], f"{name}.s")
        scales = graph.node("Unsqueeze", [scales, graph.indices(-1)], f"{name}.s1")
        return graph.node("Mul", [columns, scales], name)

    def multiplications(self, layers: int) -> dict[str, int]:
        return {"MatMulInteger": 4 * layers + 1}

    def linear_bytes(self, inputs: int, outputs: int) -> int:
        return inputs * outputs + 4 * outputs

    def head_bytes(self, width: int, vocab_size: int) -> int:
        return width * vocab_size + 4 * vocab_size

    def _quantise_rows(self, graph: GraphWriter, x: str, name: str, zero: int) -> tuple[str, str]:
        """(uint8 [B,S,K] around `zero`, float scale [B,S,1])."""
        ends = []
        for reduce, room in (("ReduceMax", ACTIVATION_MAX - zero), ("ReduceMin", -zero)):
            end = graph.node(reduce, [x, graph.indices(-1)], f"{name}.{reduce}", keepdims=1)
            ends.append(graph.node("Div", [end, graph.scalar(room)], f"{name}.{reduce}.scale"))
        scale = graph.node("Max", [*ends, graph.scalar(1e-8)], f"{name}.row_scale")
        row = graph.node("Div", [x, scale], f"{name}.scaled")
        row = graph.node("Round", [row], f"{name}.rounded")
        row = graph.node("Add", [row, graph.scalar(zero)], f"{name}.shifted")
        return graph.node("Cast", [row], f"{name}.row", to=2), scale


class Int4Blocks(Int8PerRow):
    """The layers in 4 bits: blocks of 32 inputs share a scale, a last partial block is
    padded with zeros. LM head and embedding stay int8: they are a small part of the
    model and hold most of the error (measured: KL 0.0014 instead of 0.0051)."""

    name = "int4"

    def linear(
        self, graph: GraphWriter, x: str, name: str, weight: Float32, one_sided: bool = False
    ) -> str:
        inputs, outputs = weight.shape
        packed, scales = quantise_blocks(weight.T)
        return graph.node(
            "MatMulNBits",
            [
                x,
                graph.constant(f"{name}.weight", packed),
                graph.constant(f"{name}.scale", scales),
            ],
            name,
            FUSED,
            K=inputs,
            N=outputs,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,  # int8 products; level 1 (fp32) is three times slower
        )

    def multiplications(self, layers: int) -> dict[str, int]:
        return {"MatMulNBits": 4 * layers, "MatMulInteger": 1}

    def linear_bytes(self, inputs: int, outputs: int) -> int:
        blocks = -(-inputs // BLOCK) * outputs
        return blocks * (BLOCK // 2 + 4)


PRECISIONS: dict[str, Precision] = {p.name: p for p in (Fp32(), Int8PerRow(), Int4Blocks())}


def block_scales(blocks: Float32) -> Float32:
    """The scale per block [..., 1] with the least squared rounding error.

    Clip ratio 1 maps the value of largest size to -8, the end of the 4-bit range that
    has one step more; each ratio tried is refitted by least squares, ⟨w,q⟩ / ⟨q,q⟩.
    """
    index = np.abs(blocks).argmax(-1)[..., None]
    largest = np.take_along_axis(blocks, index, -1) / np.float32(-INT4_LIMIT)
    best = np.where(largest == 0, np.float32(1), largest)
    best_error = np.full_like(largest, np.inf)
    for ratio in CLIP_RATIOS:
        scale = np.where(largest == 0, np.float32(1), largest * ratio)
        q = np.clip(np.rint(blocks / scale), -INT4_LIMIT, INT4_LIMIT - 1)
        norm = (q * q).sum(-1, keepdims=True)
        scale = np.where(
            norm == 0, scale, (blocks * q).sum(-1, keepdims=True) / np.maximum(norm, 1)
        )
        error = np.square(blocks - scale * q).sum(-1, keepdims=True)
        better = error < best_error
        best, best_error = np.where(better, scale, best), np.where(better, error, best_error)
    return np.asarray(best, np.float32)


def quantise_columns(weight: Float32) -> tuple[Int8, Float32]:
    """[K,N] → int8 [K,N] within ±INT8_LIMIT, scale [N]."""
    largest = np.abs(weight).max(0)
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(INT8_LIMIT))
    scale = scale.astype(np.float32)
    return np.clip(np.rint(weight / scale), -INT8_LIMIT, INT8_LIMIT).astype(np.int8), scale


def quantise_blocks(weight: Float32) -> tuple[UInt8, Float32]:
    """[N,K] → two 4-bit values a byte [N, blocks, BLOCK/2] around 8, scale [N, blocks]."""
    rows, inputs = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -inputs % BLOCK)))
    blocks = padded.reshape(rows, -1, BLOCK)
    scale = block_scales(blocks)
    q = np.clip(np.rint(blocks / scale), -INT4_LIMIT, INT4_LIMIT - 1) + INT4_LIMIT
    packed = q.astype(np.uint8)
    return packed[..., 0::2] | packed[..., 1::2] << 4, scale[..., 0]


def step_bytes(config: GPT2Config, precision: str) -> int:
    """Bytes of matrices that one decoding step reads, by formula."""
    p = PRECISIONS[precision]
    layer = sum(p.linear_bytes(k, n) for k, n in config.layer_matrices())
    return config.layers * layer + p.head_bytes(config.width, config.vocab_size)


def stored_bytes(config: GPT2Config, precision: str) -> int:
    """Bytes of all weights of a model, by formula: what a second copy of a tied
    embedding, or a matrix that was left in float32, would exceed."""
    in_layers = config.layers * sum(k * n for k, n in config.layer_matrices())
    in_tables = (1 if config.tied else 2) * config.width * config.vocab_size
    float32 = 4 * (config.parameters - in_layers - in_tables)
    embedding = PRECISIONS[precision].head_bytes(config.width, config.vocab_size)
    return step_bytes(config, precision) + float32 + (0 if config.tied else embedding)
