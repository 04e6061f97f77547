"""Answers that begin with their request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_slm_runtime import SLM, load
from edge_slm_runtime.choices import Choices
from edge_slm_runtime.errors import BadSetting
from edge_slm_runtime.restating import beginnings
from edge_slm_runtime.text import TextCodec


@pytest.mark.parametrize(
    ("request_text", "expected"),
    [
        ("a dog in a park", ["A dog in a park"]),
        ("dog in a park.", ["Dog in a park", "The dog in a park", "A dog in a park"]),
        ("old man", ["Old man", "The old man", "An old man"]),
        ("Old man", ["Old man", "The old man", "The Old man", "An old man", "An Old man"]),
        ("hour glass", ["Hour glass", "The hour glass", "A hour glass", "An hour glass"]),
        ("Eiffel Tower at night", ["Eiffel Tower at night", "The Eiffel Tower at night"]),
        ("red tulips in a vase", ["Red tulips in a vase", "The red tulips in a vase"]),
        ("bus at a stop", ["Bus at a stop", "The bus at a stop", "A bus at a stop"]),
        ("kids run through  a yard", ["Kids run through a yard", "The kids run through a yard"]),
        ("sewing a sail", ["Sewing a sail", "The sewing a sail"]),
        ("two cats", ["Two cats"]),
        ("3 cats", ["3 cats"]),
        ("please draw me a red barn", ["A red barn"]),
        ("Can you make a poster for a fair?", []),
        ("make a poster for a fair", ["A poster for a fair"]),
        ("Design a poster for a fair", ["A poster for a fair"]),
        ("make it blue", []),
        ("what is this", []),
        ("is this a cat?", []),
        ("*sparkles*", []),
        (" . ", []),
        ("a b c d e f g", ["A b c d e f g"]),
        ("a b c d e f g h", []),  # leaves too little of 11 words
    ],
)
def test_what_an_answer_may_begin_with(request_text: str, expected: list[str]) -> None:
    assert list(beginnings(request_text, 11)) == expected


def test_any_length_leaves_room() -> None:
    assert beginnings("a " + "b " * 99, None)


def test_a_beginning_is_one_of_its_texts(codec: TextCodec) -> None:
    texts = "A cat", "The cat", "A"
    beginning = Choices(texts, codec.encode, leads=("",))
    found, open_ = set(), [[]]
    while open_:
        ids = open_.pop()
        following = beginning.next(ids, ())
        open_ += [[*ids, token] for token in following]
        if not following:
            found.add(codec.decode(ids))
    assert found == {"A cat", "The cat"}  # the longer one where both begin alike
    assert beginning.longest == max(len(codec.encode(text)) for text in texts)


@pytest.fixture(scope="module", params=[("onnxruntime", "fp32"), ("numba", "int8")], ids="-".join)
def restating(request: pytest.FixtureRequest, with_grammar: Callable[..., Path]) -> Iterator[SLM]:
    with load(with_grammar(restated=("image",)), *request.param, 1) as slm:
        yield slm


def test_a_grammar_names_tasks_whose_answers_restate(restating: SLM) -> None:
    asked = {"words": 9, "max_new_tokens": 70}
    for temperature in (0.0, 1.5):
        settings = {**asked, "temperature": temperature, "seed": 3 if temperature else None}
        text = restating.generate("a wet dog", task="image", **settings).text
        assert text.startswith("A wet dog")
        assert not text[len("A wet dog")].isalnum()  # its last word stays as it is
        assert not restating.generate("a wet dog", task="title", **settings).text.startswith(
            "A wet"
        )
    pieces = list(restating.stream("a wet dog", task="image", **asked))
    assert "".join(pieces).startswith("A wet dog")
    assert restating.generate("wet dog", task="image", **asked).text.startswith(
        ("Wet dog", "A wet dog", "The wet dog")
    )


def test_what_stands_against_it(restating: SLM) -> None:
    asked = {"task": "image", "words": 9, "max_new_tokens": 70}
    for settings in (
        {"restate": False},
        {"ban": ["dog"]},
        {"stop": "wet"},
        {"max_new_tokens": 8},
        {"words": 4},
        {"choices": ["blue", "green"]},
    ):
        text = restating.generate("a wet dog", **{**asked, **settings}).text
        assert not text.startswith("A wet dog"), settings
    kept = restating.generate("a wet dog", **asked, keep=["dog", "red"]).text
    assert kept.startswith("A wet dog")
    assert "red" in kept
    with pytest.raises(BadSetting, match="restate is 1"):
        restating.generate("a dog", restate=1)


def test_batches_and_the_best_of_several_restate_alike(restating: SLM) -> None:
    asked = {"task": "image", "words": 9, "max_new_tokens": 70}
    requests = ["a wet dog", "two cats", "tree"]
    alone = [restating.generate(one, **asked).text for one in requests]
    assert [one.text for one in restating.generate_batch(requests, **asked)] == alone
    assert restating.generate("a wet dog", **asked, best_of=4).text.startswith("A wet dog")
