from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_slm.distill.rewards import WIDTH, Relevance
from edge_slm.distill.samples import Sample

SAMPLES = [
    Sample("a red fox in the snow", "A red fox stands in deep snow, soft light", "image"),
    Sample("a red fox in the snow", "An accountant files the quarterly tax report", "image"),
]


def test_relevance_tells_a_match_from_a_mismatch(cache: Path) -> None:
    match, mismatch = Relevance(cache).score(SAMPLES)
    assert match > 0.6
    assert mismatch < 0.2


def test_embeddings_come_back_from_the_cache(tmp_path: Path) -> None:
    first = Relevance(tmp_path).score(SAMPLES)
    again = Relevance(tmp_path)
    assert again.score(SAMPLES) == pytest.approx(first, abs=2e-3)
    assert again._model is None  # nothing was computed


def test_a_torn_cache_row_is_dropped(tmp_path: Path) -> None:
    Relevance(tmp_path).embed(["one", "two"])
    file = next(tmp_path.iterdir())
    row = 20 + 2 * WIDTH
    assert file.stat().st_size == 2 * row
    with file.open("r+b") as handle:
        handle.truncate(2 * row - 7)
    vectors = Relevance(tmp_path).embed(["one", "two"])
    assert file.stat().st_size == 2 * row
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-2)
