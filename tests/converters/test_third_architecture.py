"""What an architecture takes: one file (`starcoder2`), a row in the registry, a row in a test.

Everything else reads traits: writers, engines, the gate and the bundle know it without a change.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_slm_converters import VARIANTS, architectures, convert, goldens, read_checkpoint
from edge_slm_converters.gguf_reader import read_gguf
from edge_slm_converters.gguf_writer import write_gguf
from edge_slm_runtime import verify

from . import starcoder2
from .conftest import IDS, Original, logits_of
from .llama_server import LlamaServer
from .test_conformance import TOLERANCE, WRITERS

SHAPE = {"model_type": "starcoder2", "num_key_value_heads": 2, "sliding_window": None}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures.ARCHITECTURES, "starcoder2", starcoder2)  # type: ignore[arg-type]
    monkeypatch.setitem(architectures.GGUF_ARCHITECTURES, "starcoder2", starcoder2)  # type: ignore[arg-type]


@pytest.fixture
def model(original: Callable[..., Original]) -> Original:
    return original(**SHAPE, tie_word_embeddings=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_knows_it(writer: str, model: Original, tmp_path: Path) -> None:
    logits = WRITERS[writer](read_checkpoint(model.path), tmp_path)
    assert np.abs(logits - model.logits).max() < TOLERANCE


def test_llama_cpp_computes_it_and_its_file_is_read_again(model: Original, tmp_path: Path) -> None:
    source = read_checkpoint(model.path)
    write_gguf(source, tmp_path / "m.gguf", "F32")
    ids = list(IDS[:16])
    for _ in range(8):
        ids.append(int(logits_of(model.path, ids)[-1].argmax()))
    assert LlamaServer(tmp_path / "m.gguf", 96).greedy(IDS[:16], 8) == ids[16:]
    again = read_gguf(tmp_path / "m.gguf")
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)


@pytest.mark.slow
def test_a_bundle_of_every_variant_is_made_of_it(
    original: Callable[..., Original], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled for its traits; int4 is fitted by its forward pass."""
    monkeypatch.setattr(goldens, "EXAMPLES", 4)
    model = original(**SHAPE, max_position_embeddings=160)
    manifest = convert(model.path, tmp_path / "bundle", tuple(VARIANTS), accept=True)
    assert {variant.name for variant in manifest.variants} == set(VARIANTS)
    assert verify(tmp_path / "bundle").model.traits == ("layer", "rotary", "plain")
    by_name = {variant.name: variant.fidelity or {} for variant in manifest.variants}
    for engine in ("onnx", "numba"):  # of one quantisation
        assert by_name[f"{engine}-int8"]["kl_mean"] < 0.05
