from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_slm_runtime import SLM, CommandSchema, load
from edge_slm_runtime.text import TextCodec

# Those that may guess tokens, those that our own sampler steps, and all.
GUESSING = [("numba", "int8"), ("numba", "int4")]
STEPPED = [
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("onnxruntime", "int4"),
    *GUESSING,
]
VARIANTS = [*STEPPED, ("ctranslate2", "fp32"), ("ctranslate2", "int8")]


@pytest.fixture(scope="session")
def codec(tiny_bundle: Path) -> TextCodec:
    from edge_slm_runtime import read_manifest

    return TextCodec(tiny_bundle / "tokenizer.json", read_manifest(tiny_bundle).prompt)


@pytest.fixture(scope="session")
def schema(tiny_bundle: Path) -> CommandSchema:
    from edge_slm_runtime import read_manifest

    return read_manifest(tiny_bundle).prompt.grammar


@pytest.fixture(scope="session", params=VARIANTS, ids="-".join)
def slm(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[SLM]:
    """The tiny bundle in every variant."""
    engine, precision = request.param
    with load(tiny_bundle, engine, precision, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="session", params=STEPPED, ids="-".join)
def stepped_slm(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[SLM]:
    """The tiny bundle in the variants that our own sampler steps."""
    engine, precision = request.param
    with load(tiny_bundle, engine, precision, threads=1) as loaded:
        yield loaded
