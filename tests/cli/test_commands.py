"""Each subcommand on a tiny model, as a user runs it."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_slm.cli import main
from edge_slm_runtime import cores, load, read_manifest, thread_choice, tolerance
from edge_slm_runtime.bundle import file_entry, manifest_digest

REPOSITORY = Path(__file__).parents[2]
EDGE_SLM = [sys.executable, "-c", "from edge_slm.cli import main; main(prog_name='edge-slm')"]


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def error_of(result: Result, code: str, exit_code: int) -> str:
    """The one line of a failure."""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"error[{code}]: ")
    assert result.exit_code == exit_code
    assert result.stdout == ""
    return result.stderr


# -- train, evaluate ----------------------------------------------------------


def test_a_recipe_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[[stages]]\ntokens = 1\n", "utf-8")
    arguments = ("distill", recipe, "--data", tmp_path, "--out", tmp_path / "run")
    assert "data: Field required" in error_of(run(*arguments), "data", 8)
    assert not (tmp_path / "run").exists()


def test_the_gate_measures_on_held_out_pairs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "samples.jsonl"
    rows = [
        {"request": f"a cabin number {i}", "response": f"{i} cabins, snow", "task": "image"}
        for i in range(100)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    arguments = ("convert", source, tmp_path / "b", "--variants", "onnx-int8", "--accept")
    error = error_of(run(*arguments, "--data", data), "data", 8)
    assert "no recipe.json" in error
    (source / "recipe.json").write_text('{"recipe": {"data": {"holdout_percent": 5}}}', "utf-8")
    manifest = json.loads(run(*arguments, "--data", data, "--json").stdout)
    scored = manifest["variants"][0]["fidelity"]["positions"]
    assert 20 < scored < 500  # about five pairs of the hundred, a dozen tokens or more each


def test_no_command_is_answered_with_the_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Exit codes:" in result.stdout
    assert "error" not in result.stderr


def test_unknown_subcommand_and_missing_bundle(tmp_path: Path) -> None:
    error_of(run("destil"), "usage", 2)
    error_of(run("info", tmp_path / "nothing"), "bundle_not_found", 4)


# -- bundles --------------------------------------------------------------------


def test_info(tiny_bundle: Path) -> None:
    data = json.loads(run("info", tiny_bundle, "--json").stdout)
    assert data == read_manifest(tiny_bundle).to_json()
    text = run("info", tiny_bundle).stdout
    for variant in data["variants"]:
        assert variant["name"] in text
    assert "image, video, title" in text


def test_verify_files_and_goldens(tiny_bundle: Path) -> None:
    data = json.loads(run("verify", tiny_bundle, "--goldens", "--json").stdout)
    manifest = read_manifest(tiny_bundle)
    assert data["digest"] == manifest.digest
    assert data["goldens"] == {v.name: len(manifest.goldens) for v in manifest.variants}
    assert "goldens match" not in run("verify", tiny_bundle).stdout


def test_convert_then_refuse_to_overwrite(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    arguments = ("convert", tiny_checkpoint, out, "--variants", "onnx-int8", "--name", "small")
    assert "top-1" in error_of(run(*arguments), "gate_refused", 7)
    assert not out.exists()
    data = json.loads(run(*arguments, "--accept", "--json").stdout)
    assert data["name"] == "small"
    assert [v["name"] for v in data["variants"]] == ["onnx-int8"]
    assert run("verify", out, "--goldens").exit_code == 0
    error_of(run(*arguments, "--accept"), "target_exists", 9)
    error_of(run("convert", tmp_path / "none", tmp_path / "b"), "checkpoint", 6)


# -- measuring ------------------------------------------------------------------


def test_profile(tiny_bundle: Path) -> None:
    arguments = ("profile", tiny_bundle, "--variants", "onnx-int8", "--threads", 1, "--rounds", 1)
    data = json.loads(run(*arguments, "--json").stdout)
    (row,) = data["rows"]
    assert (row["variant"], row["threads"], row["fits"]) == ("onnx-int8", 1, True)
    assert row["medians"]["answers_ms"].keys() == {"16", "32"}  # 64 words do not fit
    assert data["advice"]["chosen"]["engine"] == "onnxruntime"
    assert data["machine"]["packages"]["onnxruntime"]

    shown = run(*arguments, "--max-memory-mb", 1, "--max-latency-ms", 0.001)
    assert shown.exit_code == 0
    assert "allowed 1; " in shown.stdout  # in the row
    assert "nothing fits; the closest is onnx-int8 on 1 thread" in shown.stdout
    assert "--max-latency-ms" in shown.stdout


def test_profile_chooses_among_variants_and_threads(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # for the threads that it remembers
    chosen = ("--variants", "onnx-int8,onnx-int4", "--threads", "1,2", "--rounds", 1)
    shown = run("profile", tiny_bundle, *chosen)
    assert shown.exit_code == 0, shown.stderr
    for heading in ("threads", "TTFT ms", "ms for 16/32 words", "peak MB", "← choose"):
        assert heading in shown.stdout
    assert "choose onnx-int" in shown.stdout
    assert f"edge_slm.load('{tiny_bundle}', engine='onnxruntime', precision=" in shown.stdout


@pytest.mark.parametrize("busy", [False, True])
def test_what_profile_remembers_is_the_default(
    busy: bool, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (thread_choice, cores):
        monkeypatch.setattr(module, "default_threads", lambda: 2)
    monkeypatch.setattr(sys.modules["edge_slm.cli.profile"], "_busy", lambda _: busy)
    chosen = ("--variants", "onnx-int8,onnx-int4", "--threads", "1,2", "--rounds", 1, "--json")
    data = json.loads(run("profile", tiny_bundle, *chosen).stdout)
    if busy:
        assert data["remembered"] == {}
        return
    assert data["remembered"].keys() == {"onnx-int8", "onnx-int4"}
    for variant in read_manifest(tiny_bundle).variants:
        if threads := data["remembered"].get(variant.name):
            with load(tiny_bundle, "onnxruntime", variant.precision) as slm:
                assert slm.threads == threads


def test_profile_that_cannot_measure(tiny_bundle: Path, tmp_path: Path) -> None:
    error_of(run("profile", tiny_bundle, "--variants", "onnx-int2"), "variant_not_found", 5)
    error_of(run("profile", tmp_path / "nothing"), "bundle_not_found", 4)
    error_of(run("profile", tiny_bundle, "--threads", "two"), "usage", 2)
    late = run("profile", tiny_bundle, "--seconds", 0.01)
    assert late.exit_code == 5
    assert "nothing could be measured (no time left: give more --seconds)" in late.stderr
    assert "onnx-fp32" in late.stdout


def test_profile_stopped_by_ctrl_c_shows_what_it_has(tiny_bundle: Path) -> None:
    psutil = pytest.importorskip("psutil")
    arguments = ["profile", str(tiny_bundle), "--variants", "onnx-int8", "--threads", "1,2"]
    process = subprocess.Popen(
        [*EDGE_SLM, *arguments, "--seconds", "300", "--rounds", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    seen: set[int] = set()
    while len(seen) < 2 and process.poll() is None:  # then the first process has ended
        seen |= {child.pid for child in psutil.Process(process.pid).children()}
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    shown, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == "error[interrupted]: stopped by Ctrl-C"
    assert "not measured" in shown
    assert "choose onnx-int8 on 2 threads" in shown


@pytest.mark.slow
def test_demo_converts_and_measures_every_variant(tiny_checkpoint: Path) -> None:
    result = run("demo", "--checkpoint", tiny_checkpoint, "--threads", 1, "--json")
    cells = json.loads(result.stdout)["cells"]
    assert {cell["engine"] for cell in cells} == {"numba", "onnxruntime", "ctranslate2"}
    assert {cell["precision"] for cell in cells} == {"fp32", "int8", "int4"}
    for cell in cells:
        assert len({answer["asked"]["task"] for answer in cell["answers"]}) > 1
        assert len({answer["asked"]["words"] for answer in cell["answers"]}) > 1


@pytest.mark.slow
def test_demo_prints_texts_and_a_table(tiny_checkpoint: Path) -> None:
    result = run("demo", "--checkpoint", tiny_checkpoint, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert "a red fox in the snow" in result.stdout
    for heading in ("words asked→got", "TTFT ms", "ms/token", "tokens/s", "peak RSS MB", "disk MB"):
        assert heading in result.stdout
    assert "ctranslate2-int8" in result.stdout
    assert result.stdout.rstrip().endswith("edge-slm profile")


# -- help -----------------------------------------------------------------------


def test_the_help_texts_in_the_docs_are_current() -> None:
    rendered: dict[str, Any] = runpy.run_path(str(REPOSITORY / "docs/render_cli.py"))
    written = (REPOSITORY / "docs/cli.md").read_text("utf-8")
    assert rendered["render"]() == written, "run `make docs`"


def test_the_tolerance_that_the_help_promises() -> None:
    assert tolerance(10) == (8, 12)
    assert tolerance(50) == (45, 55)


# -- terminals and encodings --------------------------------------------------


def test_a_closed_pipe_is_quiet(tiny_bundle: Path) -> None:
    process = subprocess.Popen(
        [*EDGE_SLM, "batch", "-", "--bundle", str(tiny_bundle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    line = json.dumps({"id": 1, "request": "a fox", "task": "image", "max_new_tokens": 2})
    _, stderr = process.communicate((line + "\n").encode() * 20)
    assert stderr == b""
    assert process.returncode == 1


SEVERAL = """
import json, sys
from edge_slm.cli import main
for arguments in json.loads(sys.argv[1]):
    main(arguments, prog_name="edge-slm", standalone_mode=False)
"""


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "utf-8", "utf-16"])
def test_any_encoding_of_the_output(tiny_bundle: Path, encoding: str) -> None:
    options = ["--bundle", str(tiny_bundle), "--task", "image", "--max-new-tokens", "4"]
    asked = ["generate", "ein Café 東京 🦊", *options]
    commands = [[*asked, "--json"], ["info", str(tiny_bundle)], asked]
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(commands)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer, _ = json.JSONDecoder().raw_decode(done.stdout.decode(encoding))
    assert answer["request"] == "ein Café 東京 🦊"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_error(tiny_bundle: Path, closed: str) -> None:
    command = f'"$0" -m edge_slm generate a --bundle "$1" --max-new-tokens 3 {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, str(tiny_bundle)],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def renamed(bundle: Path, name: str, tmp_path: Path) -> Path:
    """With another name, and a digest that fits."""
    copy = Path(shutil.copytree(bundle, tmp_path / "renamed"))
    data = json.loads((copy / "manifest.json").read_text("utf-8"))
    data["name"] = name
    data["digest"] = manifest_digest(data)
    (copy / "manifest.json").write_text(json.dumps(data), "utf-8")
    return copy


def test_a_bundle_does_not_control_the_terminal(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = renamed(tiny_bundle, "x[/]y \x1b]0;title\x1b[2J\x9b31m\u202e", tmp_path)
    shown = run("info", bundle)
    assert shown.exit_code == 0
    assert "x[/]y \\x1b]0;title\\x1b[2J\\x9b31m\\u202e" in shown.stdout
    (bundle / "\x1b[31mred").write_text("")
    assert "\\x1b[31mred" in error_of(run("verify", bundle), "file_unlisted", 4)


def test_a_byte_order_mark_is_no_part_of_a_request(tiny_bundle: Path) -> None:
    mark = "\ufeff".encode()
    options = ("--bundle", tiny_bundle, "--max-new-tokens", 5)
    texts = [
        run("generate", "-", *options, stdin=begin + b"a red fox").stdout for begin in (b"", mark)
    ]
    assert texts[0] == texts[1]
    line = b'{"id": 1, "request": "a", "task": null, "max_new_tokens": 2}\r\n'
    lines = run("batch", "-", "--bundle", tiny_bundle, stdin=mark + line + line).stdout.splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("damage", "said"), [(0, "no longer gives its golden tokens"), (255, "cannot run here: the ")]
)
def test_every_variant_is_verified_by_its_name(
    damage: int, said: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Also a second one of the same engine and precision, which `load` would not choose."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = read_manifest(bundle)
    shutil.copytree(bundle / "onnx-int8", bundle / "second")
    data = bytearray((bundle / "second/model.data").read_bytes())
    data[::7] = bytes([damage]) * len(data[::7])
    (bundle / "second/model.data").write_bytes(data)
    first = next(v for v in manifest.variants if v.name == "onnx-int8")
    goldens = [replace(g, ids={**g.ids, "second": g.ids["onnx-int8"]}) for g in manifest.goldens]
    files = dict(manifest.files)
    files |= {
        f"second/{n}": file_entry(bundle / f"second/{n}") for n in ("model.onnx", "model.data")
    }
    changed = replace(
        manifest,
        variants=(*manifest.variants, replace(first, name="second", path="second")),
        goldens=tuple(goldens),
        files=files,
    )
    (bundle / "manifest.json").write_text(json.dumps(changed.to_json()))
    result = run("verify", bundle, "--goldens")
    assert f"second {said}" in error_of(result, "self_test_failed", 4)
    (bundle / "manifest.json").write_text(json.dumps(replace(changed, goldens=()).to_json()))
    assert "second: not tested: it has no goldens" in run("verify", bundle, "--goldens").stdout
