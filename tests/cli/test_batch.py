"""`edge-slm batch`: bad lines, resuming, and SIGKILL at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from edge_slm.cli.output import ResumableOutput
from edge_slm_runtime import files, load
from edge_slm_runtime.errors import DataError, TargetExists

from .test_commands import EDGE_SLM, error_of, run


def rows(count: int) -> list[dict[str, Any]]:
    """Requests of several kinds, half of them sampled without a seed of their own."""
    words, tasks = (2, 3, None), ("image", "video", "title", None)
    return [
        {
            "id": f"row-{i}",
            "request": ("a cosy cabin", "ein Café 🦊")[i % 2],
            "task": tasks[i % 4],
            "words": words[i % 3],
            "temperature": 0.9 * (i % 2),
            "max_new_tokens": 4 + i % 7,
        }
        for i in range(count)
    ]


def write_rows(path: Path, count: int) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(count))
    path.write_text(text + '{"id": "bad", "request": "a", "task": "poem"}\n', encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_answers_come_in_input_order_with_what_was_asked(tiny_bundle: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    result = run("batch", source, "-o", output, "--bundle", tiny_bundle, "--json")
    assert json.loads(result.stdout) == {
        "output": str(output),
        "lines": 41,
        "errors": 1,
        "repeated_ids": 0,
    }
    answers = read(output)
    for row, answer in zip(rows(40), answers, strict=False):
        assert answer["id"] == row["id"]
        assert answer["task"] == row["task"]
        assert answer["asked_words"] == row["words"]
        assert answer["words"] == len(answer["text"].split())
        assert (answer["in_tolerance"] is None) == (row["words"] is None)
        assert (answer["seed"] is None) == (row["temperature"] == 0)
    assert answers[40]["error"]["code"] == "unknown_task"
    assert not output.with_name("out.jsonl.part").exists()


@pytest.mark.parametrize(
    ("line", "code", "name"),
    [
        (b"{", "data", None),
        (b"[1, 2]", "data", None),
        (b"\xff", "data", None),
        (b'{"id": 1.5, "request": "a"}', "data", None),
        (b'{"id": "\\ud800", "request": "a", "task": null}', "data", None),
        (b'{"id": "x", "task": "image"}', "data", "x"),
        (b'{"id": "x", "request": "a", "text": "b"}', "data", "x"),
        (b'{"id": "x", "request": "a", "deep": ' + b"[" * 99 + b"]" * 99 + b"}", "data", None),
        (b'{"id": "x", "request": "a", "task": null, "stop": 3}', "data", "x"),
        (b'{"id": "x", "request": "a", "task": null, "keep_length": 1}', "data", "x"),
        (b'{"id": 7, "request": "", "task": null}', "empty_request", 7),
        (b'{"id": 7, "request": "a", "task": null, "words": "3"}', "bad_setting", 7),
        (b'{"id": 7, "request": "a", "task": null, "words": 900}', "words_out_of_range", 7),
        (b'{"id": 7, "request": "a", "task": null, "temperature": []}', "bad_setting", 7),
        (b'{"id": 7, "request": "a", "task": null, "top_p": NaN}', "bad_setting", 7),
        (b'{"id": 7, "request": "<|end|>", "task": null}', "control_token_in_request", 7),
    ],
)
def test_a_bad_line_becomes_an_error_and_the_rest_goes_on(
    line: bytes, code: str, name: object, tiny_bundle: Path
) -> None:
    good = b'{"id": "good", "request": "a", "task": null, "max_new_tokens": 2}\n'
    result = run("batch", "-", "--bundle", tiny_bundle, stdin=good + b"\n" + line + b"\n" + good)
    first, bad, last = (json.loads(answer) for answer in result.stdout.splitlines())
    assert result.exit_code == 0
    assert last == {**first, "line": 4, "repeats": 1}
    assert first["id"] == "good"
    assert bad["line"] == 3
    assert bad["id"] == name
    assert bad["error"]["code"] == code


def test_stdin_and_stdout_give_the_same_lines_as_files(tiny_bundle: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 20)
    settings = ("--bundle", tiny_bundle, "--seed", 3)
    run("batch", source, "-o", tmp_path / "a", *settings)
    run("batch", "-", "-o", tmp_path / "b", *settings, stdin=source.read_bytes())
    streamed = run("batch", "-", *settings, stdin=source.read_bytes())
    assert streamed.stdout == (tmp_path / "a").read_text("utf-8") == (tmp_path / "b").read_text()


def test_a_line_overrides_the_options(tiny_bundle: Path) -> None:
    lines = (
        '{"id": 1, "request": "a", "task": null, "max_new_tokens": 2}\n'
        '{"id": 2, "request": "a", "task": null, "max_new_tokens": 2, "seed": 11}\n'
        '{"id": 3, "request": "a", "task": null, "max_new_tokens": 2, "temperature": 0}\n'
    )
    result = run("batch", "-", "--bundle", tiny_bundle, "--temperature", 1, stdin=lines)
    seeds = [json.loads(line)["seed"] for line in result.stdout.splitlines()]
    assert seeds[0] is not None
    assert seeds[1:] == [11, None]


def test_lines_ban_words_of_their_own(tiny_bundle: Path) -> None:
    options = ("--bundle", tiny_bundle, "--engine", "onnxruntime", "--max-new-tokens", 20)
    free = json.loads(run("batch", "-", *options, stdin='{"request": "a cabin"}\n').stdout)
    first, second = re.findall(r"\w+", free["text"])[:2]
    rows = json.dumps({"request": "a cabin", "ban": [first, second]})
    listed = json.loads(run("batch", "-", *options, stdin=rows).stdout)
    table = f"request,ban\na cabin,{first} | {second}\n"
    cells = json.loads(run("batch", "-", *options, "--format", "csv", stdin=table).stdout)
    asked = ("generate", "a cabin", *options, "--best-of", 1)
    given = run(*asked, "--ban", first, "--ban", second).stdout
    assert listed["text"] == cells["text"] == given.rstrip("\n") != free["text"]
    assert not {first, second} & set(re.findall(r"\w+", listed["text"]))
    bad = run("batch", "-", *options, stdin='{"request": "a", "ban": 1}').stdout
    assert "'ban' must be a text" in json.loads(bad)["error"]["message"]


def test_lines_of_several_answers(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = (
        '{"request": "a cabin", "n": 3}\n'
        '{"request": "a cabin"}\n'
        '{"request": "a cabin", "n": 0}\n'
        '{"request": "a cabin", "logprobs": true, "other": 1}\n'
    )
    options = ("--bundle", tiny_bundle, "--engine", "onnxruntime", "--max-new-tokens", 8)
    source = tmp_path / "in.jsonl"
    source.write_text(lines, "utf-8")
    assert run("batch", source, *options, "-o", tmp_path / "out").exit_code == 0
    several, plain, bad, scored = read(tmp_path / "out")
    assert run("batch", "-", *options, stdin=lines).stdout == (tmp_path / "out").read_text("utf-8")
    texts = [one["text"] for one in (several, *several["others"])]
    scores = [one["score"] for one in (several, *several["others"])]
    assert len(set(texts)) == 3
    assert scores == sorted(scores, reverse=True)
    assert not {"score", "others", "logprobs"} & set(plain)
    assert "n is 0" in bad["error"]["message"]
    assert (len(scored["logprobs"]), scored["other"]) == (8, 1)
    given = ("generate", "a cabin", *options, "--n", 3, "--seed", 4)
    told = json.loads(run(*given, "--json").stdout)
    assert run(*given).stdout == "".join(f"{' '.join(x['text'].split())}\n" for x in told)


def test_the_best_of_several_for_a_line(tiny_bundle: Path) -> None:
    lines = '{"request": "a cabin", "best_of": 4}\n{"request": "a cabin", "best_of": 0}\n'
    options = ("--bundle", tiny_bundle, "--engine", "onnxruntime", "--max-new-tokens", 8)
    best, bad = map(json.loads, run("batch", "-", *options, stdin=lines).stdout.splitlines())
    with load(tiny_bundle, "onnxruntime") as slm:
        told = slm.generate("a cabin", best_of=4, max_new_tokens=8)
    assert (best["text"], best["score"]) == (told.text, told.score)
    assert "best_of is 0" in bad["error"]["message"]
    table = run("batch", "-", *options, "--format", "csv", stdin="request,best_of\na cabin,4\n")
    assert json.loads(table.stdout)["text"] is not None
    asked = run("batch", "-", *options, "--best-of", 4, stdin='{"request": "a cabin"}\n')
    assert json.loads(asked.stdout)["text"] == best["text"]


# -- resuming -------------------------------------------------------------------


def test_killed_again_and_again_it_ends_up_as_if_undisturbed(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", 600)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert run("batch", source, "-o", whole, "--bundle", tiny_bundle).exit_code == 0

    chance = random.Random(2)
    command = [*EDGE_SLM, "batch", str(source), "-o", str(killed), "--bundle", str(tiny_bundle)]
    part = killed.with_name("killed.jsonl.part")
    deaths = 0
    for _ in range(4):
        before = part.stat().st_size if part.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if part.exists() and part.stat().st_size > before:  # it is writing new lines
                time.sleep(chance.uniform(0, 0.05))
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        deaths += process.wait() == -signal.SIGKILL
    assert deaths >= 2
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert killed.read_bytes() == whole.read_bytes()
    assert len(read(killed)) == 601


@pytest.mark.parametrize("torn", [b"", b'{"id": "row-', b"\0" * 40, b'{"id": 1}\n{"a'])
def test_a_torn_tail_is_computed_again(torn: bytes, tiny_bundle: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 80), tmp_path / "out.jsonl"
    command = ("batch", source, "-o", output, "--bundle", tiny_bundle)
    run(*command)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    leave_part(output, lines[:50], torn)
    result = run(*command)
    assert "continuing after line 32 of 81" in result.stderr  # whole groups only
    assert output.read_bytes() == whole


def leave_part(output: Path, lines: list[bytes], tail: bytes = b"") -> Path:
    """What a killed run leaves: its lines, and the sums of their groups."""
    output.unlink()
    groups = [b"".join(lines[i : i + 32]) for i in range(0, len(lines) - 31, 32)]
    sums = "".join(hashlib.sha256(group).hexdigest() + "\n" for group in groups)
    output.with_name(f"{output.name}.part.sums").write_text(sums)
    part = output.with_name(f"{output.name}.part")
    part.write_bytes(b"".join(lines) + tail)
    return part


def test_an_altered_answer_is_computed_again(tiny_bundle: Path, tmp_path: Path) -> None:
    """One that is JSON still, in the second group."""
    source, output = write_rows(tmp_path / "in.jsonl", 120), tmp_path / "out.jsonl"
    command = ("batch", source, "-o", output, "--bundle", tiny_bundle)
    run(*command)
    whole = output.read_bytes()
    part = leave_part(output, whole.splitlines(keepends=True)[:100])
    part.write_bytes(part.read_bytes().replace(b'"row-40"', b'"row-41"'))
    assert "continuing after line 32 of 121" in run(*command).stderr
    assert output.read_bytes() == whole


@pytest.mark.parametrize("at", [-1, -200, 300])
def test_an_output_changed_afterwards_is_not_called_complete(
    at: int, tiny_bundle: Path, tmp_path: Path
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 8), tmp_path / "out.jsonl"
    command = ("batch", source, "-o", output, "--bundle", tiny_bundle)
    run(*command)
    output.write_bytes(output.read_bytes()[:at])
    assert "was changed" in error_of(run(*command), "data", 8)


def test_lines_appended_meanwhile_are_not_of_this_run(tiny_bundle: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 400), tmp_path / "out.jsonl"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    command = [*EDGE_SLM, "batch", str(source), "-o", str(output), "--bundle", str(tiny_bundle)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    part = output.with_name("out.jsonl.part")
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.002)
    with source.open("a") as file:
        file.write('{"id": "late", "request": "a", "task": null}\n' * 50)
    assert process.wait() == 0
    assert len(read(output)) == 401
    record = json.loads(output.with_name("out.jsonl.run.json").read_text())
    assert record["input_sha256"] == digest
    assert record["output"][1] == hashlib.sha256(output.read_bytes()).hexdigest()


def test_a_run_that_starts_as_another_ends_finds_it_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has opened the part, and gets the lock when that is the output."""
    first = ResumableOutput(tmp_path / "out", {"seed": 1}, 4)
    first.append({"a": 1})
    real = files.lock

    def late(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(files, "lock", real)
        first.finish()
        real(*arguments, **options)

    monkeypatch.setattr(files, "lock", late)
    with ResumableOutput(tmp_path / "out", {"seed": 1}, 4) as second:
        assert second.complete
    assert (tmp_path / "out").read_bytes() == b'{"a": 1}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.run.json"}


def test_starts_together_leave_one_run_and_its_record(tiny_bundle: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 30)
    for attempt in range(3):
        output = tmp_path / f"out{attempt}"
        command = [*EDGE_SLM, "batch", str(source), "-o", str(output), "--threads", "1"]
        command += ["--bundle", str(tiny_bundle), "--engine", "onnxruntime"]
        processes = [
            subprocess.Popen([*command, "--seed", str(seed)], stderr=subprocess.DEVNULL)
            for seed in (1, 2, 1)
        ]
        codes = [process.wait() for process in processes]
        assert 0 in codes
        assert set(codes) <= {0, 8}
        record = json.loads(output.with_name(f"{output.name}.run.json").read_text())
        assert all(
            seed == record["seed"] for seed, code in zip((1, 2, 1), codes, strict=True) if not code
        )
        assert record["output"][1] == hashlib.sha256(output.read_bytes()).hexdigest()


def test_a_complete_run_may_be_started_again(tiny_bundle: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 8), tmp_path / "out.jsonl"
    command = ("batch", source, "-o", output, "--bundle", tiny_bundle, "--json")
    first, before = run(*command), output.read_bytes()
    again = run(*command)
    assert again.stdout == first.stdout
    assert "complete already" in again.stderr
    assert output.read_bytes() == before


def test_other_settings_or_input_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 8), tmp_path / "out.jsonl"
    command = ("batch", source, "-o", output, "--bundle", tiny_bundle)
    run(*command)
    assert "seed: 0 → 1" in error_of(run(*command, "--seed", 1), "data", 8)
    assert "variant" in error_of(run(*command, "--precision", "int4"), "data", 8)
    write_rows(source, 9)
    assert "input_sha256" in error_of(run(*command), "data", 8)


def test_a_file_of_something_else_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    output.write_text("precious")
    error_of(run("batch", source, "-o", output, "--bundle", tiny_bundle), "target_exists", 9)
    assert output.read_text() == "precious"
    missing = run("batch", tmp_path / "none", "-o", tmp_path / "b", "--bundle", tiny_bundle)
    error_of(missing, "data", 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
def test_files_to_remove_are_named(tiny_bundle: Path, tmp_path: Path) -> None:
    """None that are not of the run, above all not the input."""
    source, output = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("a\n")
    command = ("batch", source, "--bundle", tiny_bundle, "--max-new-tokens", 2, "-o")
    run(*command, output)
    (tmp_path / "out.notes").write_text("")
    changed = error_of(run(*command, output, "--seed", 1), "data", 8)
    assert changed.endswith("(give another output, or remove out and out.run.json)\n")
    assert "is the INPUT itself" in error_of(run(*command, source), "usage", 2)
    os.mkfifo(tmp_path / "pipe")
    pipe = error_of(run(*command, tmp_path / "pipe"), "target_exists", 9)
    assert pipe.endswith("pipe exists already (give another output)\n")


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    record = {"settings": [1, 2]}
    with ResumableOutput(tmp_path / "out", record, 4) as output:
        output.append({})
        with pytest.raises(DataError, match="another process"):
            ResumableOutput(tmp_path / "out", record, 4)
        output.finish()
    assert (tmp_path / "out").read_bytes() == b"{}\n"
    shutil.move(tmp_path / "out.run.json", tmp_path / "elsewhere")
    with pytest.raises(TargetExists):
        ResumableOutput(tmp_path / "out", record, 4)


def test_ctrl_c_stops_with_130_and_the_run_can_go_on(tiny_bundle: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 600), tmp_path / "out.jsonl"
    command = [*EDGE_SLM, "batch", str(source), "-o", str(output), "--bundle", str(tiny_bundle)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    part = output.with_name("out.jsonl.part")
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.split("\n")[-2] == (
        f"error[interrupted]: stopped by Ctrl-C (the same command continues {output})"
    )
    assert part.exists()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="POSIX")
def test_an_input_that_never_ends_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    for more in ([], ["-o", tmp_path / "out.jsonl"]):
        result = run("batch", "/dev/zero", "--bundle", tiny_bundle, *more)
        assert "more than 256 MiB" in error_of(result, "data", 8)
    assert not list(tmp_path.iterdir())
    result = run("bench", "--compare", "/dev/zero", "/dev/zero")
    assert "File too large" in error_of(result, "data", 8)
