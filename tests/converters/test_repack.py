"""The numba variants of a bundle that has ONNX ones alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import edge_slm
from edge_slm.cli import main
from edge_slm_converters import calibration_texts, convert
from edge_slm_converters.repack import repack
from edge_slm_converters.synthetic import random_checkpoint
from edge_slm_runtime import verify
from edge_slm_runtime.errors import CheckpointError, TargetExists

pytest.importorskip("numba")
ONNX = ["onnx-int8", "onnx-int4"]
NUMBA = ["numba-int8", "numba-int4"]
LLAMA = {
    "architecture": "llama",
    "width": 48,
    "heads": 3,
    "kv_heads": 1,
    "head_width": 32,
    "inner": 100,
    "tied": False,
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def bundles(
    request: pytest.FixtureRequest, tiny_text_side: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(with the numba variants, without) of one checkpoint."""
    folder = tmp_path_factory.mktemp("repack")
    traits = LLAMA if request.param == "llama" else {"width": 64, "heads": 4}
    shape = {"layers": 2, "vocab_size": 417, "positions": 128, **traits}
    source = random_checkpoint(folder / "model", **shape, like=tiny_text_side, std=0.2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calibration_texts, "SAMPLES", (64, 64))  # to calibrate random weights
        convert(source, folder / "both", [*ONNX, *NUMBA], name="tiny", accept=True)
        convert(source, folder / "onnx", ONNX, name="tiny", accept=True)
    return folder / "both", folder / "onnx"


def test_it_gives_what_converting_the_checkpoint_gives(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    both, onnx = bundles
    made = repack(onnx, tmp_path / "out")
    assert verify(tmp_path / "out") == made
    converted = verify(both)
    assert [v.name for v in made.variants] == [*ONNX, *NUMBA]
    for name in NUMBA:
        precision = name.removeprefix("numba-")
        ours, theirs = (
            np.fromfile(bundle / name / "model.safetensors", np.uint8)
            for bundle in (tmp_path / "out", both)
        )
        if converted.model.norm == "layer" or precision == "int4":  # others keep channels too
            assert np.array_equal(ours, theirs)
        with (
            edge_slm.load(both, engine="numba", precision=precision) as before,
            edge_slm.load(tmp_path / "out", engine="numba", precision=precision) as after,
        ):
            prompt = before.check("a red fox").prompt
            np.testing.assert_array_equal(before.logits(prompt), after.logits(prompt))
    for golden, other in zip(made.goldens, converted.goldens, strict=True):
        assert golden == other
    assert made.provenance["repacked_from"] == verify(onnx).digest
    assert made.base == verify(onnx).base


def test_where_there_is_nothing_to_do(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    both, onnx = bundles
    with pytest.raises(CheckpointError, match="without its numba variant"):
        repack(both, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "note").write_text("mine")
    with pytest.raises(TargetExists):
        repack(onnx, tmp_path)


def test_the_command(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    _, onnx = bundles
    result = CliRunner().invoke(main, ["repack", str(onnx), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "numba-int4" in result.output
    manifest = json.loads((tmp_path / "out/manifest.json").read_text("utf-8"))
    assert manifest["digest"] in result.output
