"""`edge-slm distill` from nothing to an evaluated model, killed again and again on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECIPE = """
seed = 2
[data]
tasks = ["image", "tags"]
holdout_percent = 10
[teacher]
kind = "grammar"
requests = 60
candidates = 2
[reward]
relevance = 1.0
fluency = 1.0
[model]
vocab_size = 600
layers = 2
width = 32
heads = 2
positions = 160
dropout = 0.1
[train]
batch_tokens = 640
precision = "fp32"
compile = false
countdown = 0.3
save_every = 2
evaluate_every = 4
[[stages]]
tokens = 5120
[explore]
rounds = 1
requests = 10
best = 20
tokens = 2560
"""


def start(recipe: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "edge_slm", "distill", str(recipe)]
    return subprocess.Popen(
        [*command, "--out", str(out), "--requests", "4", "--json", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(process: subprocess.Popen[str]) -> dict[str, object]:
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    result = json.loads(said)
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE, "utf-8")
    return path


@pytest.mark.timeout(600)
def test_from_nothing_to_an_evaluation_through_many_deaths(recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = finished(start(recipe, whole, "--plain-baseline"))
    assert result["requests"] == 4
    page = (whole / "evaluation.html").read_text("utf-8")
    assert "<svg" in page

    deaths = 0
    for sign in ("teacher.jsonl", "state.pt", "round-1.start", "checkpoint", "bundle"):
        process = start(recipe, broken)
        while process.poll() is None and not (broken / sign).exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        deaths += process.returncode == -signal.SIGKILL
    assert deaths >= 3  # a fast machine may outrun one
    again = finished(start(recipe, broken))
    same = ("teacher.jsonl", "checkpoint/model.safetensors", "round-1.jsonl")
    assert [(whole / name).read_bytes() for name in same] == [
        (broken / name).read_bytes() for name in same
    ]
    assert again["length"] == result["length"]
    # A finished run only shows what is there.
    before = (broken / "evaluation.json").stat().st_mtime_ns
    assert finished(start(recipe, broken)) == again
    assert (broken / "evaluation.json").stat().st_mtime_ns == before
