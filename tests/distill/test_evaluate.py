from __future__ import annotations

import json
import math
from pathlib import Path

import edge_slm
from edge_slm.distill.evaluate import evaluate
from edge_slm.distill.samples import held_out_samples
from edge_slm.distill.split import held_out

from .conftest import made_samples


def test_held_out_samples_are_held_out_and_shared_among_tasks(tmp_path: Path) -> None:
    data = tmp_path / "samples.jsonl"
    rows = [
        {"request": f"{task} {i}", "response": f"text {i} of {task}, long", "task": task}
        for task, count in (("image", 300), ("video", 30))
        for i in range(count)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    samples = held_out_samples([data], ["image", "video"], 40, percent=30)
    assert all(held_out(s.request, 30) for s in samples)
    assert len(samples) == 40
    few = sum(s.task == "video" for s in samples)
    assert 0 < few < 20  # all that there are; the rest are of the other task
    assert len(held_out_samples([data], ["image", "video"], 4, percent=30)) == 4


def test_the_shipped_model_under_evaluation() -> None:
    samples = [s for s in made_samples(40) if s.task == "image"][:3]
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
