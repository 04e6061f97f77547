from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_slm_runtime import SLM, CommandSchema, load
from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.kernels import compiled
from edge_slm_runtime.text import TextCodec

# Those that may guess tokens, those that our own sampler steps, and all.
GUESSING = [("numba", "int8"), ("numba", "int4")]
STEPPED = [
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("onnxruntime", "int4"),
    *GUESSING,
]
GPT2 = Traits("layer", "learned", "plain")
IMAGES = sys.platform == "linux" and platform.machine() == "x86_64"
needs_images = pytest.mark.skipif(not IMAGES, reason="images are for x86-64 Linux")
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


@pytest.fixture(scope="session")
def code(object_files: dict[Traits, bytes]) -> bytes:
    """An object file, really compiled; where the cache of this user held an image, only now."""
    return object_files.get(GPT2) or compiled._compile(GPT2)
