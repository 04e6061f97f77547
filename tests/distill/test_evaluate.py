from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import edge_slm
from edge_slm.distill.evaluate import evaluate
from edge_slm.distill.samples import held_out_samples
from edge_slm.distill.split import held_out
from edge_slm_runtime.errors import DataError


def test_held_out_samples_are_held_out_and_shared_among_tasks(data_file: Path) -> None:
    samples = held_out_samples([data_file], ["image", "tags"], 4, percent=30)
    assert [s.task for s in samples] == ["image", "image", "tags", "tags"]
    assert all(held_out(s.request, 30) for s in samples)
    with pytest.raises(DataError, match=r"has \d+ held-out requests, 200 are needed"):
        held_out_samples([data_file], ["image"], 200, percent=30)
    assert len(held_out_samples([data_file], ["image"], 200, percent=30, at_most=True)) < 200


def test_the_shipped_model_under_evaluation(data_file: Path) -> None:
    samples = held_out_samples([data_file], ["image"], 3, percent=30)
    with edge_slm.load(threads=1) as slm:
        result = evaluate(slm, samples, lengths=(8, 20))
    json.dumps(result)
    alone, kept = result["length"]["model alone"], result["length"]["with the promise"]
    assert kept["in_tolerance"] == 1.0 >= alone["in_tolerance"]
    assert kept["n"] == 6
    assert set(kept["by_length"]) == {8, 20}
    assert [row["level"] for row in result["relevance"]] == [*range(10), None]
    low, high = (result["relevance"][level]["relevance"] for level in (0, 9))
    assert low < high
    assert result["ratio"] == high / result["teacher"]["relevance"]
    assert math.isfinite(result["relevance"][0]["standard_error"])
