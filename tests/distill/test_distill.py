"""`edge-slm distill` from nothing to an evaluated model, killed again and again on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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


# Runs that are killed at the signs, one that goes to the end, and one that finds it finished.
RUNS = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from distill.forks import status_of
from edge_slm.cli import main

recipe, out, *signs = sys.argv[2:]
def run(said):
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
    main(["distill", recipe, "--out", out, "--requests", "4", "--json"])

ends = [status_of(lambda: run(os.devnull), Path(out, sign)) for sign in signs]
for said in ("end.json", "finished.json"):
    ends.append(status_of(lambda: run(f"{out}-{said}")))
    ends.append(Path(out, "evaluation.json").stat().st_mtime_ns)
print(json.dumps(ends))
"""


def python(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE, "utf-8")
    return path


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.timeout(600)
def test_from_nothing_to_an_evaluation_through_many_deaths(recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ("--requests", 4, "--json", "--plain-baseline")
    result = json.loads(python("-m", "edge_slm", "distill", recipe, "--out", whole, *options))
    assert result["requests"] == 4
    page = (whole / "evaluation.html").read_text("utf-8")
    assert "<svg" in page

    signs = ("teacher.jsonl", "round-1.start", "bundle")  # more deaths: test_loop
    out = python("-c", RUNS, Path(__file__).parents[1], recipe, broken, *signs)
    *deaths, end, written, finished, left = json.loads(out)
    assert set(deaths) <= {0, -signal.SIGKILL}
    assert deaths.count(-signal.SIGKILL) >= 2  # a fast machine may outrun one
    assert (end, finished) == (0, 0)
    same = ("teacher.jsonl", "checkpoint/model.safetensors", "round-1.jsonl")
    assert [(whole / name).read_bytes() for name in same] == [
        (broken / name).read_bytes() for name in same
    ]
    # A finished run only shows what is there.
    again, shown = (
        json.loads((tmp_path / f"broken-{said}.json").read_text("utf-8"))
        for said in ("end", "finished")
    )
    assert again["length"] == result["length"]
    assert (shown, left) == (again, written)
