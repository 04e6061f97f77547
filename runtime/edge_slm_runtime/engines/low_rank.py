"""Adapters in memory, as the kernels of the numba engine read them (`kernels.low_rank`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.deltas import Delta
from edge_slm_runtime.engines.weights import Weights
from edge_slm_runtime.errors import AdapterInvalid
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.panels import LANES, UNIT, alternating

Float32 = NDArray[np.float32]


class LowRank:
    """An adapter's table (`kernels.layout`), and the factors that it refers to. rank: the largest
    of a matrix, filled up to whole vectors."""

    def __init__(self, delta: Delta, weights: Weights) -> None:
        """Raises AdapterInvalid, ManifestInvalid."""
        matrices = weights.decoder.matrices()
        self.rank = -(-delta.rank // LANES) * LANES
        self.table = np.zeros((len(matrices), t.CHANGE), np.int64)
        self._kept: list[NDArray[Any]] = []
        for row, matrix in zip(self.table, matrices, strict=True):
            if matrix in delta.factors:
                a, b = _as_stored(delta, matrix, weights)
                fill = -len(b) % LANES
                row[t.INPUTS], row[t.RANK] = len(a), len(b) + fill
                row[t.FIRST_FACTOR] = self._keep(np.pad(a, ((0, 0), (0, fill))))
                columns = -b.shape[1] % UNIT
                row[t.SECOND_FACTOR] = self._keep(np.pad(b, ((0, fill), (0, columns))))
        if not all(np.isfinite(factor).all() for factor in self._kept):
            raise AdapterInvalid(f"adapter {delta.name} has values beyond half precision")

    def _keep(self, factor: Float32) -> int:
        """The address of a factor [K, N] as float16 [N / 16, K, 16]."""
        parts = factor.reshape(len(factor), -1, LANES).swapaxes(0, 1)
        with np.errstate(over="ignore"):
            self._kept.append(np.ascontiguousarray(parts).astype(np.float16))
        return int(self._kept[-1].ctypes.data)


def _as_stored(delta: Delta, matrix: str, weights: Weights) -> tuple[Float32, Float32]:
    """The factors for weights as they are stored: their channels divided, the queries' factor in
    them, the halves of a gated layer panel by panel."""
    decoder, (layer, kind) = weights.decoder, matrix.rsplit(".", 1)
    a, b = (factor.astype(np.float32) for factor in delta.factors[matrix])
    if (channels := weights.channels(matrix)) is not None:
        a *= channels[:, None]
    if kind == "qkv":
        b[:, : decoder.attention_width] *= decoder.attention_scale[int(layer.split(".")[1])]
        if (channels := weights.channels(f"{layer}.out")) is not None:
            read = channels.reshape(decoder.kv_heads, -1, decoder.head_width)
            b[:, -decoder.kv_width :] /= read[:, 0].ravel()
    if kind == "up" and decoder.mlp == "gated":
        if (channels := weights.channels(f"{layer}.down")) is not None:
            b[:, decoder.inner :] /= channels
        b = alternating(b)
    return a, b
