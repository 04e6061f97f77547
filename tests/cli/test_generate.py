"""`edge-slm generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import edge_slm
from edge_slm_runtime import load

from .test_commands import error_of, run


def test_generate_streams_text_to_stdout_and_statistics_to_stderr(tiny_bundle: Path) -> None:
    asked = ("generate", "a cosy cabin", "--bundle", tiny_bundle, "--words", 2, "--task", "image")
    streamed = run(*asked, "--best-of", 1)
    whole = json.loads(run(*asked, "--best-of", 1, "--json").stdout)
    assert streamed.exit_code == 0
    assert streamed.stdout == whole["text"] + "\n"
    assert f"{whole['words']} words of 2 asked" in streamed.stderr
    assert "TTFT" in streamed.stderr


def test_generate_prints_the_best_of_eight(tiny_bundle: Path) -> None:
    asked = ("generate", "a cosy cabin", "--bundle", tiny_bundle, "--max-new-tokens", 6)
    shown = run(*asked)
    with load(tiny_bundle) as slm:
        best = slm.generate("a cosy cabin", max_new_tokens=6, best_of=8)
    assert shown.stdout == best.text + "\n"
    assert "the best of 8 in " in shown.stderr
    assert "TTFT" not in shown.stderr
    whole = json.loads(run(*asked, "--json").stdout)
    assert (whole["text"], whole["score"]) == (best.text, best.score)


def test_generate_reads_the_request_from_stdin(tiny_bundle: Path) -> None:
    settings = ("--bundle", tiny_bundle, "--max-new-tokens", 8, "--json")
    piped = json.loads(run("generate", "-", *settings, stdin="ein Café\n").stdout)
    given = json.loads(run("generate", "ein Café", *settings).stdout)
    assert piped["token_ids"] == given["token_ids"]


def test_generate_passes_every_setting_on(tiny_bundle: Path) -> None:
    result = run(
        *("generate", "a fox", "--bundle", tiny_bundle, "--json", "--seed", 5, "--threads", 1),
        *("--engine", "onnxruntime", "--precision", "int4", "--relevance", 9, "--words", 60),
        *("--temperature", 0.9, "--top-k", 40, "--top-p", 0.9, "--repetition-penalty", 1.1),
        *("--stop", "###", "--stop", "+++", "--max-new-tokens", 4, "--no-keep-length"),
        *("--best-of", 1),
    )
    answer = json.loads(result.stdout)
    assert answer["seed"] == 5
    assert answer["asked"] == {"task": None, "words": 60, "relevance": 9}
    assert answer["stats"]["precision"] == "int4"
    assert answer["stats"]["threads"] == 1
    assert answer["stats"]["new_tokens"] <= 4


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (("a", "--task", "poem"), "unknown_task", 3),
        (("a", "--words", "5000"), "words_out_of_range", 3),
        (("a", "--temperature", "-1"), "bad_setting", 3),
        (("  ",), "empty_request", 3),
        (("<|end|>",), "control_token_in_request", 3),
        (("a", "--precision", "int9"), "usage", 2),
        (("a", "--no-such-option"), "usage", 2),
    ],
)
def test_a_failure_is_one_line_and_its_exit_code(
    arguments: tuple[str, ...], code: str, exit_code: int, tiny_bundle: Path
) -> None:
    error_of(run("generate", "--bundle", tiny_bundle, *arguments), code, exit_code)


def test_stdin_that_is_not_utf8_is_refused(tiny_bundle: Path) -> None:
    result = run("generate", "-", "--bundle", tiny_bundle, stdin=b"caf\xe9")
    assert "at byte 3" in error_of(result, "request_not_text", 3)


def test_the_small_model_says_what_it_is_for(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", "a fox", "--bundle", tiny_bundle, "--max-new-tokens", 3)
    assert "prompts-115m" not in run(*asked).stderr
    monkeypatch.setattr(edge_slm, "shipped_bundle", lambda: tiny_bundle)
    assert "pip install ./models/prompts-115m" in run(*asked).stderr


def test_a_model_that_judges_its_answers_tells_its_confidence(
    with_grammar: Callable[..., Path],
) -> None:
    bundle = with_grammar(confidence=True)
    asked = {"request": "a red fox", "task": "image", "words": 8, "max_new_tokens": 40}
    kinds: tuple[dict[str, int], ...] = ({}, {"best_of": 2}, {"n": 2})
    lines = "".join(json.dumps(asked | kind) + "\n" for kind in kinds)
    told = run("batch", "-", "--bundle", bundle, stdin=lines).stdout
    plain, best, several = map(json.loads, told.splitlines())
    assert "confidence" not in plain
    for one in (best, several, *several["others"]):
        assert 0 < one["confidence"] < 1
    said = run("generate", "a red fox", "--bundle", bundle, "--task", "image", "--words", 8)
    assert "confidence 0." in said.stderr
