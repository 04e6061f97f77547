"""Every architecture × every writer of float32: the predictions are those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from edge_slm_bench.metrics.fidelity import log_softmax
from edge_slm_bench.runners import Spec, open_runner
from edge_slm_converters import gate
from edge_slm_converters.arrays import Float32
from edge_slm_converters.checkpoint import Checkpoint, read_checkpoint
from edge_slm_converters.ct2 import write_ctranslate2
from edge_slm_converters.gguf_writer import write_gguf
from edge_slm_converters.graph import write_graph
from edge_slm_converters.openvino_ir import write_openvino
from edge_slm_runtime.errors import CheckpointError

from .conftest import IDS, Original
from .llama_server import LlamaServer
from .shapes import GPT2, LLAMA

TOLERANCE = 1e-4
# llama.cpp takes GELU from a table in half precision, and computes no other activation here.
TABLE_TOLERANCE = 1e-2
NOT_IN_LLAMA_CPP = {
    *("gelu", "relu", "silu", "tanh", "unscaled attention", "scaled by layer"),
    *("gelu gate", "exact gelu gate", "relu gate"),
}


def onnx(source: Checkpoint, folder: Path) -> Float32:
    write_graph(source, "fp32", folder)
    return gate.onnx_logits(folder, source.decoder, "fp32")(IDS)


def ctranslate2(source: Checkpoint, folder: Path) -> Float32:
    pytest.importorskip("ctranslate2")
    write_ctranslate2(source, "fp32", folder)
    return gate.ctranslate2_logits(folder, source.decoder, "fp32")(IDS)


def openvino(source: Checkpoint, folder: Path) -> Float32:
    pytest.importorskip("openvino")
    write_openvino(source, "fp32", folder)
    spec = Spec("openvino", "openvino", "openvino", "fp32", str(folder), 0, 0, True)
    runner = open_runner(spec, 1)
    try:
        return runner.logits(IDS)
    finally:
        runner.close()


WRITERS: Mapping[str, Callable[[Checkpoint, Path], Float32]] = {
    "onnx": onnx,
    "ctranslate2": ctranslate2,
    "openvino": openvino,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("shape", [*GPT2, *LLAMA])
def test_logits_are_those_of_transformers(
    original: Callable[..., Original], tmp_path: Path, shape: str, writer: str
) -> None:
    model = original(**{**GPT2, **LLAMA}[shape])
    logits = WRITERS[writer](read_checkpoint(model.path), tmp_path)
    assert np.abs(logits - model.logits).max() < TOLERANCE


@pytest.mark.parametrize("shape", [*GPT2, *LLAMA])
def test_llama_cpps_probabilities_are_those_of_transformers(
    original: Callable[..., Original], tmp_path: Path, shape: str
) -> None:
    """Its server hands out logarithms of probabilities, after one prompt at a time."""
    pytest.importorskip("gguf")
    model = original(**{**GPT2, **LLAMA}[shape])
    source = read_checkpoint(model.path)
    if shape in NOT_IN_LLAMA_CPP:
        with pytest.raises(CheckpointError, match=r"llama\.cpp"):
            write_gguf(source, tmp_path / "m.gguf", "F32")
        return
    write_gguf(source, tmp_path / "m.gguf", "F32")
    server = LlamaServer(tmp_path / "m.gguf", source.decoder.positions)
    expected = log_softmax(model.logits)
    tolerance = TOLERANCE if shape in LLAMA else TABLE_TOLERANCE
    for length in (1, 20, len(IDS)):
        found = server.log_shares(IDS[:length], source.decoder.vocab_size)
        assert len(found) == source.decoder.vocab_size
        for token, log_share in found.items():
            assert log_share == pytest.approx(expected[length - 1, token], abs=tolerance)
