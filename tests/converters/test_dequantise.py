"""The checkpoint that a bundle computes with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_slm_converters import convert, read_checkpoint
from edge_slm_converters.dequantise import write_checkpoint_of
from edge_slm_runtime import verify
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import CheckpointError, TargetExists
from edge_slm_runtime.loading import load_variant


@pytest.fixture(scope="module", params=["onnx-int4", "onnx-int8", "onnx-fp32"])
def bundle(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("dequantise") / "bundle"
    convert(tiny_checkpoint, target, variants=[request.param], accept=True)
    return target


def test_it_computes_what_the_bundle_does(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """As far as the variant's rounding of activations and the fp16 of the checkpoint let it."""
    variant = write_checkpoint_of(bundle, tmp_path / "checkpoint")
    source = read_checkpoint(tmp_path / "checkpoint")
    original = read_checkpoint(tiny_checkpoint)
    assert source.decoder == original.decoder
    assert source.tokens == original.tokens
    assert source.form == original.form
    again = convert(source, tmp_path / "again", variants=["onnx-fp32"], accept=True)
    with (
        load_variant(bundle, verify(bundle), variant) as before,
        load_variant(tmp_path / "again", again, again.variants[0]) as after,
    ):
        prompt = source.codec.prompt("a red fox in the snow", Command("image", 24))
        p, q = (_softmax(slm.logits(prompt)) for slm in (before, after))
    assert p.argmax() == q.argmax()
    assert float((p * np.log(p / q)).sum()) < 0.01


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return np.asarray(p / p.sum())


def test_an_output_that_exists_is_kept(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(TargetExists):
        write_checkpoint_of(bundle, tmp_path)
    assert (tmp_path / "note").read_text() == "mine"


def test_a_bundle_without_an_onnx_variant_has_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    convert(tiny_checkpoint, tmp_path / "bundle", variants=["numba-int8"], accept=True)
    with pytest.raises(CheckpointError, match="no ONNX variant"):
        write_checkpoint_of(tmp_path / "bundle", tmp_path / "checkpoint")
