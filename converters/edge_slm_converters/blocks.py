"""Weights of 4 or 8 bits in blocks, as onnxruntime's MatMulNBits keeps them.

A block of inputs of one output shares a scale and a zero point:

    weight ≈ scale · (level − zero)        level and zero in 0 … 15 or 0 … 255

With 8 bits the zero point is 128 in every block, and is not stored. All matrices here are
[K,N], inputs first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_slm_converters.arrays import Float32, UInt8

TOP_LEVEL = 15  # with 4 bits
BYTE_ZERO = 128  # with 8 bits
# Ranges tried when a scale is chosen, as shares of what the values of a block span: a
# narrower one clips the ends and has finer steps.
RANGES = tuple(np.linspace(0.65, 1, 8, dtype=np.float32))


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [K,N] in blocks of `size` inputs, the last of them perhaps not full.

    steps: level − zero, [K,N]. scale and zero: [blocks, N]. All are float32; steps and
    zero hold whole numbers.
    """

    bits: int
    size: int
    steps: Float32
    scale: Float32
    zero: Float32

    def matrix(self) -> Float32:
        """What is multiplied with, [K,N]."""
        return self.steps * np.repeat(self.scale, self.size, 0)[: len(self.steps)]

    def packed(self) -> dict[str, UInt8 | Float32]:
        """MatMulNBits' inputs: levels [N, blocks, bytes of a block], of 4-bit ones two a
        byte, the first in the lower half; scales [N, blocks]; zero points, two a byte."""
        inputs, outputs = self.steps.shape
        steps = np.pad(self.steps, ((0, len(self.scale) * self.size - inputs), (0, 0)))
        levels = steps.reshape(-1, self.size, outputs) + self.zero[:, None]
        stored = levels.transpose(2, 0, 1).astype(np.uint8)
        if self.bits == 8:
            return {"weight": stored, "scale": self.scale.T}
        zero = np.pad(self.zero, ((0, len(self.zero) % 2), (0, 0))).T.astype(np.uint8)
        return {"weight": _pairs(stored), "scale": self.scale.T, "zero": _pairs(zero)}


def block_bytes(inputs: int, outputs: int, bits: int, size: int) -> int:
    """Bytes of a stored matrix: levels, scales, zero points."""
    blocks = -(-inputs // size)
    zeros = -(-blocks // 2) if bits == 4 else 0
    return outputs * (blocks * (size * bits // 8 + 4) + zeros)


def bytewise(weight: Float32, size: int) -> Blocks:
    """`weight` in 8 bits, rounded to nearest, the largest value of a block at ±127."""
    blocks = -(-len(weight) // size)
    padded = np.pad(weight, ((0, blocks * size - len(weight)), (0, 0)))
    padded = padded.reshape(blocks, size, -1)
    largest = np.abs(padded).max(1)
    scale = np.where(largest > 0, largest / np.float32(BYTE_ZERO - 1), np.float32(1))
    steps = np.rint(padded / scale[:, None]).reshape(-1, weight.shape[1])[: len(weight)]
    return Blocks(8, size, steps, scale, np.full_like(scale, BYTE_ZERO))


def nearest(weight: Float32, size: int, ranges: tuple[np.float32, ...] = RANGES) -> Blocks:
    """`weight` rounded to nearest, its scales those of least squared error."""
    every, steps, scales = np.ones(size, np.float32), [], []
    for start in range(0, len(weight), size):
        block = weight[start : start + size]
        scale, zero = best_scale(block, every[: len(block)], ranges)
        steps.append(to_steps(block, scale, zero))
        scales.append((scale, zero))
    return Blocks(4, size, np.concatenate(steps), *map(np.stack, zip(*scales, strict=True)))


def to_steps(values: Float32, scale: Float32, zero: Float32) -> Float32:
    """The nearest level − zero of values [...,N], with scale and zero [N]."""
    steps: Float32 = np.clip(np.rint(values / scale), -zero, TOP_LEVEL - zero)
    return steps


def best_scale(
    block: Float32, importance: Float32, ranges: tuple[np.float32, ...] = RANGES
) -> tuple[Float32, Float32]:
    """Scale and zero point [N] of `block` [B,N] with the least squared rounding error,
    inputs weighted by `importance` [B].

    Each range tried is mapped to the levels, its scale refitted by least squares, ⟨w,s⟩ / ⟨s,s⟩
    of the weights and their steps, and judged by the steps that this scale gives.
    """
    weight = (importance / importance.mean())[:, None]
    low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
    best_error = np.full(block.shape[1], np.inf, np.float32)
    best_scale = best_zero = np.ones_like(best_error)
    for share in ranges:
        scale = (high - low) * (share / TOP_LEVEL)
        scale = np.where(scale > 0, scale, np.float32(1))
        zero = np.clip(np.rint(-low * share / scale), 0, TOP_LEVEL)
        steps = to_steps(block, scale, zero)
        fitted = (block * steps * weight).sum(0)
        norm = (steps * steps * weight).sum(0)
        scale = np.where(fitted > 0, fitted / np.where(norm > 0, norm, 1), scale)
        error = (np.square(block - to_steps(block, scale, zero) * scale) * weight).sum(0)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_zero = np.where(better, zero, best_zero)
    return best_scale, best_zero


def _pairs(values: UInt8) -> UInt8:
    """Two values of 0 … 15 a byte, along the last axis."""
    pairs: UInt8 = values[..., 0::2] | values[..., 1::2] << np.uint8(4)
    return pairs
