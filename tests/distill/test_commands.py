"""`edge-slm train` and `edge-slm evaluate`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_slm.cli import main

RECIPE = """
seed = 3
[data]
tasks = ["image", "tags"]
[model]
vocab_size = 512
layers = 1
width = 32
heads = 2
positions = 96
[train]
tokens = 768
batch_tokens = 192
compile = false
"""


def test_train_writes_a_checkpoint_and_says_where(
    data_file: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE, "utf-8")
    arguments = ["train", str(tmp_path / "recipe.toml"), "--data", str(data_file)]
    arguments += ["--out", str(tmp_path / "run"), "--cache", str(cache)]
    stopped = CliRunner().invoke(main, [*arguments, "--max-steps", "1", "--json"])
    assert stopped.exit_code == 0, stopped.stderr
    assert json.loads(stopped.stdout)["written"].endswith("state.pt")
    finished = CliRunner().invoke(main, arguments)
    assert finished.stdout.strip() == str(tmp_path / "run" / "checkpoint")
    assert "train 4/4" in finished.stderr
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_evaluate_prints_both_tables(tmp_path: Path, as_json: bool) -> None:
    rows = [
        {"request": f"a fox number {i}", "response": f"a fox number {i}, in snow", "task": "image"}
        for i in range(150)
    ]
    data = tmp_path / "samples.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    arguments = ["evaluate", "--data", str(data), "--task", "image", "--requests", "2"]
    result = CliRunner().invoke(main, arguments + ["--json"] * as_json)
    assert result.exit_code == 0, result.stderr
    if as_json:
        assert json.loads(result.stdout)["requests"] == 2
    else:
        assert "with the promise" in result.stdout
        assert "Spearman(level, mean relevance)" in result.stdout
