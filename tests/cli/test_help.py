"""What helps a user on: examples, completion, defaults, progress, and refusals before the work."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import edge_slm
from edge_slm.cli import console, main
from edge_slm.cli.options import default_bundle
from edge_slm_converters.convert import chosen_variants
from edge_slm_runtime import errors, read_manifest
from edge_slm_runtime.errors import CheckpointError

from .test_commands import EDGE_SLM, REPOSITORY, error_of, run


def examples() -> list[str]:
    epilogs = [main.epilog or "", *(command.epilog or "" for command in main.commands.values())]
    lines = [line.strip() for epilog in epilogs for line in epilog.splitlines()]
    return [line for line in lines if line.startswith("edge-slm ")]


def test_every_command_has_examples() -> None:
    shown = {example.split()[1] for example in examples()}
    assert shown == set(main.commands)


@pytest.mark.parametrize("example", examples())
def test_an_example_can_be_parsed(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(example)[1:]
    words = words[: next((i for i, word in enumerate(words) if word[0] in "<>"), len(words))]
    name, *arguments = ["./" + word if word == "my-bundle" else word for word in words]
    parent = click.Context(main, **main.context_settings)
    with main.commands[name].make_context(name, arguments, parent=parent):
        pass


def test_the_exit_codes_are_those_of_the_errors() -> None:
    listed = [int(code) for code in re.findall(r"^ +(\d+)  ", console.EXIT_CODES, re.MULTILINE)]
    raised = {getattr(errors, name).exit_code for name in errors.__all__}
    assert listed == sorted({0, 2, 130} | raised)  # 2 and 130 are click's and the shell's


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_what_does_not_fit_into_the_memory_has_its_exit_code(tiny_bundle: Path) -> None:
    asked = f"generate fox --bundle {tiny_bundle} --engine onnxruntime --threads 500"
    limited = f"ulimit -v 3000000; exec {shlex.join(EDGE_SLM)} {asked}"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (12, "")
    assert done.stderr.startswith("error[out_of_memory]: the limit leaves ")


def completions(*words: str) -> list[str]:
    environment = {
        **os.environ,
        "_EDGE_SLM_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["edge-slm", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(EDGE_SLM, env=environment, capture_output=True, text=True, check=False)
    return [line.removeprefix("plain,") for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize("words", [("generate", "--bundle"), ("verify",), ("pack",)])
def test_bundles_are_completed(words: tuple[str, ...]) -> None:
    assert completions(*words, "") == ["dir,", *edge_slm.installed_models()]
    assert completions(*words, "./my") == ["dir,./my"]


def test_tasks_and_commands_are_completed(tiny_bundle: Path) -> None:
    tasks = list(read_manifest(default_bundle()).prompt.grammar.tasks)
    assert completions("generate", "--task", "") == tasks
    bundle = ("--bundle", str(tiny_bundle))
    assert completions("batch", *bundle, "--task", "t") == ["title"]
    assert completions("batch", "--bundle", "/nothing/there", "--task", "t") == []
    assert completions("ver") == ["verify"]
    for shell in ("bash", "zsh", "fish"):
        assert "_EDGE_SLM_COMPLETE" in run("completion", shell).stdout
    error_of(run("completion", "csh"), "usage", 2)


def test_without_a_bundle_the_shipped_one_is_meant() -> None:
    shipped = str(edge_slm.shipped_bundle())
    assert json.loads(run("verify", "--json").stdout)["bundle"] == shipped
    assert "has no variant 'none'" in error_of(
        run("profile", "--variants", "none"), "variant_not_found", 5
    )


def test_names_of_variants_are_checked_before_the_work(tiny_bundle: Path) -> None:
    asked = ("bench", tiny_bundle, "--variants", "onnx-int8, onnx-int2")
    assert "'onnx-int2' (known: " in error_of(run(*asked), "variant_not_found", 5)
    error_of(run("bench", tiny_bundle, "--variants", "a,,b"), "usage", 2)
    with pytest.raises(CheckpointError, match="cannot convert to onnx-int2 "):
        chosen_variants(["onnx-int8", "onnx-int2"])


def test_a_report_that_could_not_be_written_is_not_measured(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("bench", tiny_bundle, "--out", tmp_path / "report")
    assert "needs matplotlib" in error_of(result, "dependency_missing", 5)
    assert not (tmp_path / "report").exists()


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, told in ((60.0, ""), (0.0, "writing 1/3\nwriting 3/3\n")):
        monkeypatch.setattr(console, "_EVERY", seconds)
        with console.progress_bar() as progress:
            task = progress.add_task("writing", total=3)
            progress.advance(task)
            progress.update(task, completed=3)
        assert capsys.readouterr().err == told
    with console.progress_bar(visible=False) as progress:
        progress.advance(progress.add_task("writing", total=None))
    assert capsys.readouterr().err == ""
