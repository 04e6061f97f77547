"""`edge-slm distill` and `edge-slm evaluate`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import edge_slm
from edge_slm.cli import main

from .chat_server import ChatServer

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
batch_tokens = 192
compile = false
[[stages]]
tokens = 768
"""


@pytest.mark.slow
def test_distill_writes_a_checkpoint_and_says_where(
    data_file: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE, "utf-8")
    arguments = ["distill", str(tmp_path / "recipe.toml"), "--data", str(data_file)]
    arguments += ["--out", str(tmp_path / "run"), "--cache", str(cache)]
    arguments += ["--requests", "0"]
    stopped = CliRunner().invoke(main, [*arguments, "--max-steps", "1", "--json"])
    assert stopped.exit_code == 0, stopped.stderr
    assert json.loads(stopped.stdout)["written"].endswith("state.pt")
    finished = CliRunner().invoke(main, arguments)
    assert finished.stdout.strip() == str(tmp_path / "run" / "checkpoint")
    assert "train stage-1 4/4" in finished.stderr
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def foxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("foxes") / "samples.jsonl"
    rows = [
        {"request": f"a fox number {i}", "response": f"a fox number {i}, in snow", "task": "image"}
        for i in range(150)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return data


@pytest.mark.slow
def test_evaluate_prints_its_tables_and_writes_a_page(foxes: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["evaluate", "--data", str(foxes), "--requests", "2", "--html", str(page)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert "with the promise" in result.stdout
    assert "references" in result.stdout
    assert page.read_text("utf-8").startswith("<!doctype html>")
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 9
    assert again.stderr.startswith("error[target_exists]")


@pytest.mark.slow
def test_evaluate_beside_other_answers_and_bundles(foxes: Path) -> None:
    shipped = str(edge_slm.shipped_bundle())
    arguments = ["evaluate", "--data", str(foxes), "--task", "image", "--requests", "2", "--json"]
    arguments += ["--bundle", shipped]
    arguments += ["--answers", f"big={foxes}", "--baseline", f"plain={shipped}", "--best-of", "0"]
    with ChatServer() as server:
        result = CliRunner().invoke(main, [*arguments, "--answers", f"chatty={server.url}"])
        assert [body["model"] for _, body in server.seen] == ["chatty"] * 2
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["answers"]}
    assert rows["chatty"]["n"] == 2
    assert rows["plain"]["kind"] == "baseline"
    assert rows["big"]["scores"] == rows["references"]["scores"]  # the same texts


def test_a_server_that_does_not_answer_has_its_exit_code(foxes: Path) -> None:
    arguments = ["evaluate", "--data", str(foxes), "--task", "image", "--requests", "2"]
    with ChatServer() as server:
        server.troubles.append(401)
        result = CliRunner().invoke(main, [*arguments, "--answers", f"chatty={server.url}"])
    assert (result.exit_code, result.stdout) == (10, "")
    assert result.stderr.splitlines()[-1].startswith(f"error[teacher_failed]: {server.url}")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--answers", "big"], 2, "is not NAME=VALUE"),
        (["--answers", "a=x", "--answers", "a=y"], 2, "a name comes twice"),
        ([f"--answers={name}=x" for name in "abcdefghi"], 2, "at most 8 times"),
        (["--html", "/nowhere/page.html"], 2, "no folder"),
        (["--answers", "big=/nowhere.jsonl"], 8, "cannot read /nowhere.jsonl"),
        (["--task", "video"], 8, "too few"),
        (["--task", "poem"], 3, "unknown task 'poem'"),
    ],
)
def test_evaluate_says_what_is_wrong(
    foxes: Path, arguments: list[str], code: int, said: str
) -> None:
    result = CliRunner().invoke(main, ["evaluate", "--data", str(foxes), *arguments])
    assert (result.exit_code, result.stdout) == (code, "")
    *progress, error = result.stderr.splitlines()
    assert error.startswith("error[")
    assert said in error
    assert not any("error" in line for line in progress)
