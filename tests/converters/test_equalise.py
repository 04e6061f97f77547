"""Equalised channels: the same function, and less lost by int8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_slm_bench.metrics.examples import Scored
from edge_slm_bench.metrics.fidelity import fidelity
from edge_slm_converters.arrays import Float32
from edge_slm_converters.calibration import ForwardPass
from edge_slm_converters.checkpoint import Checkpoint, read_checkpoint
from edge_slm_converters.equalise import equalised

from .conftest import IDS, Original
from .shapes import LLAMA
from .test_panels import numba_logits

TEXTS = [Scored(tuple(IDS[start : start + 30]), 1) for start in range(0, 31, 6)]
SHAPES = ["llama", "two kv heads", "three kv heads", "other heads", "tied", "mlp bias", "qwen2"]


def logits(source: Checkpoint) -> Float32:
    forward = ForwardPass(source.decoder, source.tensors, [Scored(tuple(IDS), 1)])
    x = forward.embedded()
    for i in range(source.decoder.layers):
        x = forward.layer(i, x)
    return forward.logits(x, source.head)


def uneven(source: Checkpoint) -> Checkpoint:
    """With some channels far larger than the others, as trained models have them."""
    tensors = {
        name: tensor * np.where(np.arange(len(tensor)) % 19 == 3, np.float32(12), np.float32(1))
        if name.endswith("norm.weight") and name != "final_norm.weight"
        else tensor
        for name, tensor in source.tensors.items()
    }
    return replace(source, tensors=tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_function_stays(original: Callable[..., Original], shape: str) -> None:
    source = uneven(read_checkpoint(original(**LLAMA[shape]).path))
    even = equalised(source, TEXTS)
    before, after = logits(source), logits(even)
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-5 * np.abs(before).max())
    changed = {n for n, t in source.tensors.items() if not np.array_equal(t, even.tensors[n])}
    names = ("attention_norm.weight", "mlp_norm.weight", "qkv.weight", "out.weight")
    assert {f"layers.1.{name}" for name in names} < changed
    assert not {"embedding", "final_norm.weight", "head.weight"} & changed
    for name in ("attention_norm", "mlp_norm"):  # what is divided has the geometric mean 1
        ratio = source.tensors[f"layers.0.{name}.weight"] / even.tensors[f"layers.0.{name}.weight"]
        assert np.log(ratio).mean() == pytest.approx(0, abs=1e-4)


def test_int8_loses_less(original: Callable[..., Original], tmp_path: Path) -> None:
    source = uneven(read_checkpoint(original(**LLAMA["two kv heads"]).path))
    expected, targets = logits(source), np.array(IDS[1:])
    lost = []
    for name, model in (("as it is", source), ("even", equalised(source, TEXTS))):
        found = numba_logits(model, "int8", tmp_path / name)
        lost.append(fidelity(expected, found[:-1], targets).kl_mean)
    assert lost[1] < 0.8 * lost[0]


def test_layer_norms_are_left_alone(tiny_checkpoint: Path) -> None:
    source = read_checkpoint(tiny_checkpoint)
    assert equalised(source, TEXTS) is source
