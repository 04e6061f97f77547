"""Adapters beside the numba engine's weights: the predictions of the merged model, for every
trait, matrix and precision, up to what the weights themselves lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_slm_converters.arrays import Float32
from edge_slm_converters.checkpoint import Checkpoint, read_checkpoint
from edge_slm_converters.deltas import merged
from edge_slm_converters.equalise import equalised
from edge_slm_converters.panels import write_panels
from edge_slm_runtime.decoder import MATRICES
from edge_slm_runtime.deltas import Adapter, Delta, Factors
from edge_slm_runtime.engines.base import EngineOptions
from edge_slm_runtime.engines.numba_engine import NumbaEngine
from edge_slm_runtime.errors import AdapterInvalid, NotSupportedByEngine

from .conftest import IDS, Original
from .shapes import GPT2, LLAMA
from .test_equalise import TEXTS, logits, uneven

SHAPES = {**GPT2, **LLAMA}


def random_delta(source: Checkpoint, matrices: Sequence[str], rank: int = 5) -> Delta:
    """Of these matrices of every layer, as large as the weights are."""
    random, factors = np.random.default_rng(rank), {}
    for name, (inputs, outputs) in source.decoder.matrices().items():
        if name.split(".")[2] in matrices:
            a = random.normal(0, 1, (inputs, rank))
            b = random.normal(0, 0.2 * rank**-0.5, (rank, outputs))
            factors[name] = Factors(a.astype(np.float16), b.astype(np.float16))
    return Delta("random", "", source.base, factors)


def numba_logits(engine: NumbaEngine, delta: Delta | None = None) -> Float32:
    """Of IDS but the last, [S - 1, V], as `logits` gives them."""
    adapter = delta and Adapter(delta.name, "", delta.digest, engine.adapted(delta))
    step = engine.new_pass(engine.new_cache(1).array, len(IDS), len(IDS), [adapter])
    result: Float32 = step.run([IDS], [0])[0][:-1].copy()
    return result


def rounding(found: Float32, expected: Float32) -> float:
    return float(np.sqrt(np.square(found - expected).mean()))


@pytest.mark.parametrize(
    "shape",
    ["plain", "ugly width", "scaled by layer", "three kv heads", "odd inner", "other heads"],
)
def test_as_good_as_the_weights_are(
    original: Callable[..., Original], tmp_path: Path, shape: str
) -> None:
    source = read_checkpoint(original(**SHAPES[shape], initializer_range=0.1).path)
    if source.decoder.norm == "rms":
        source = uneven(source)
    write_panels(equalised(source, TEXTS), "int8", tmp_path)
    engine = NumbaEngine(tmp_path, source.decoder, EngineOptions(threads=2))
    base = logits(source)
    lost = rounding(numba_logits(engine), base)
    assert np.array_equal(numba_logits(engine), numba_logits(engine, None))
    for matrices, rank in [((one,), 5) for one in MATRICES] + [(MATRICES, 3), (MATRICES, 40)]:
        delta = random_delta(source, matrices, rank)
        expected = logits(merged(source, [delta]))
        assert rounding(base, expected) > 10 * lost, matrices  # an adapter without effect fails
        assert rounding(numba_logits(engine, delta), expected) < 4 * lost, matrices
    engine.close()


def test_equalised_weights_of_an_older_bundle_are_refused(
    original: Callable[..., Original], tmp_path: Path
) -> None:
    """Which do not say what their channels were divided by."""
    source = read_checkpoint(original(**LLAMA["llama"]).path)
    write_panels(replace(equalised(source, TEXTS), channels={}), "int8", tmp_path)
    engine = NumbaEngine(tmp_path, source.decoder, EngineOptions())
    with pytest.raises(NotSupportedByEngine, match="convert it again"):
        engine.adapted(random_delta(source, ["qkv"]))
    engine.close()


def test_values_beyond_half_precision_are_refused(
    original: Callable[..., Original], tmp_path: Path
) -> None:
    source = read_checkpoint(original(**LLAMA["llama"]).path)
    even = equalised(uneven(source), TEXTS)
    write_panels(even, "int8", tmp_path)
    engine = NumbaEngine(tmp_path, source.decoder, EngineOptions())
    largest = np.full((64, 1), 65504, np.float16)
    delta = Delta("large", "", "", {"layers.0.up": Factors(largest, np.ones((1, 192), np.float16))})
    with pytest.raises(AdapterInvalid, match="beyond half precision"):
        engine.adapted(delta)
    engine.close()
