"""The scripts beside the recipes: which samples are kept, and which of a model's own answers."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
FOLDER = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("curate"), importlib.import_module("expand")
    sys.path.remove(str(FOLDER))


def test_a_prompt_for_a_video_gives_the_image_that_it_shows(
    tmp_path: Path, scripts: tuple[ModuleType, ModuleType]
) -> None:
    curate, _ = scripts
    picture = (
        "A red fox stands in the deep snow, its fur bright against the white. Pines rise behind it."
    )
    video = {
        "id": "1",
        "task": "video",
        "request": "a red fox",
        "response": f"{picture} The camera pans to the left.",
        "source": "Vchitect/VBench@1:a",
    }
    written = video | {
        "id": "2",
        "response": 'A sign reads "Fox" in the deep white snow of the hill.',
    }
    test_prompt = video | {"id": "3", "task": "image", "source": "CodeGoat24/UniGenBench@1:a"}
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (video, written, test_prompt))
    )
    rows = list(curate.rows([tmp_path]))
    assert rows[0] == video
    assert [(row["task"], row["response"]) for row in rows[1:]] == [("image", picture)]


@pytest.mark.parametrize(
    ("task", "request_", "text", "good"),
    [
        ("image", "a red fox", "A red fox stands in the snow.", True),
        ("image", "a red fox", "A red fox stands in the", False),
        ("image", "a red fox", "A red foxemetery stands in the snow.", False),
        ("image", "a red fox", 'A red fox by a sign with the words "Fox".', False),
        ("image", "a sign with words", 'A sign with the words "Fox".', True),
        ("image", "a red fox", "A red fox stands in the red fox stands.", False),
        ("lettering", "Fox", 'A sign in the snow reads "Fox".', True),
        ("lettering", "Fox", 'A sign in the snow reads "Red".', False),
        ("scene", "fox, snow", "A fox stands in the snow.", True),
        ("scene", "fox, snow", "A fox stands.", False),
        ("tags", "fox", "foxes, snow, red", True),
        ("tags", "fox", "red, snow, red", False),
        ("tags", "fox", "fox, snow, red", False),
    ],
)
def test_answers_without_a_fault_are_kept(
    scripts: tuple[ModuleType, ModuleType], task: str, request_: str, text: str, good: bool
) -> None:
    _, expand = scripts
    words = "a red fox stands in the snow sign by with words reads foxes are"
    known = Counter(words.split() * 2)
    assert expand.faultless(task, request_, text, known) is good


def test_requests_that_are_held_out_are_not_answered(
    tmp_path: Path, scripts: tuple[ModuleType, ModuleType]
) -> None:
    _, expand = scripts
    rows = [
        {"task": "video", "request": f"a fox with {n} tails", "source": "x"} for n in range(200)
    ]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = expand.requests(tmp_path / "requests.jsonl", "video", 500, seed=1)
    assert 180 <= len(chosen) < 200
    assert not [text for text in chosen if expand.held_out(text, expand.HELD_PERCENT)]
    assert chosen == expand.requests(tmp_path / "requests.jsonl", "video", 500, seed=1)
