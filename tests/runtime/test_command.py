from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm_runtime.command import (
    WORD_EDGES,
    Command,
    CommandSchema,
    count_words,
    default_axes,
)
from edge_slm_runtime.errors import (
    BadSetting,
    ControlTokenInRequest,
    EmptyRequest,
    ManifestInvalid,
    RelevanceOutOfRange,
    RequestNotText,
    UnknownTask,
    WordsOutOfRange,
)
from edge_slm_runtime.records import Request
from edge_slm_runtime.request_text import clean_request, is_visible

SCHEMA = CommandSchema(default_axes(("image", "video")))
COMMANDS = st.builds(
    Command,
    st.sampled_from([None, "image", "video"]),
    st.none() | st.integers(WORD_EDGES[0], WORD_EDGES[-1] - 1),
    st.none() | st.integers(0, 9),
)
REQUESTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(
    lambda text: any(map(is_visible, text.strip())) and "<|" not in text
)


@given(REQUESTS, COMMANDS, st.text().filter(lambda text: "<|" not in text))
def test_parse_inverts_render(request: str, command: Command, response: str) -> None:
    text = SCHEMA.render(request, command) + response + "<|end|>"
    found, values, answer = SCHEMA.parse(text)
    assert found == clean_request(request)
    assert answer == response
    assert [SCHEMA.axis(a).token(v) for a, v in values.items()] == SCHEMA.command_tokens(command)


@given(st.integers(WORD_EDGES[0], WORD_EDGES[-1] - 1))
def test_every_count_lies_in_its_bucket(words: int) -> None:
    axis = SCHEMA.axis("words")
    low, high = axis.bounds(axis.value_of(words))
    assert low <= words <= high


@pytest.mark.parametrize("index", range(len(WORD_EDGES) - 1))
def test_buckets_meet_at_their_edges(index: int) -> None:
    axis = SCHEMA.axis("words")
    first, last = WORD_EDGES[index], WORD_EDGES[index + 1] - 1
    assert axis.value_of(first) == axis.value_of(last) == axis.values[index]
    assert last - first + 1 <= max(1, 0.2 * first), "wider than the tolerance"


@pytest.mark.parametrize("words", [0, -1, WORD_EDGES[-1]])
def test_words_out_of_range(words: int) -> None:
    with pytest.raises(WordsOutOfRange, match="give 1 … 160"):
        SCHEMA.check(Command(words=words))


def test_bad_values_are_named() -> None:
    with pytest.raises(UnknownTask, match="known: image, video"):
        SCHEMA.check(Command(task="poem"))
    with pytest.raises(RelevanceOutOfRange, match="give 0 … 9"):
        SCHEMA.check(Command(relevance=10))
    with pytest.raises(WordsOutOfRange, match="a huge int"):
        SCHEMA.check(Command(words=10**5000))
    for words in (True, 3.0, "3"):
        with pytest.raises(BadSetting):
            SCHEMA.check(Command(words=words))  # type: ignore[arg-type]


@given(st.text(max_size=20), st.sampled_from(SCHEMA.special_tokens()), st.text(max_size=20))
def test_control_tokens_cannot_be_smuggled(before: str, token: str, after: str) -> None:
    with pytest.raises((ControlTokenInRequest, RequestNotText)):
        clean_request(before + token + after)


def test_requests_that_are_no_text() -> None:
    with pytest.raises(RequestNotText):
        clean_request(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(RequestNotText, match="at character 1"):
        clean_request("a\ud800")
    unseen = (
        "\u200b\u2060",
        "\ufeff",
        " \u00ad\x07 ",
        "\u3164\u2800",
        "\ufe0f",
        "\U000e0100",
        "\u202e\u2069",
    )
    for empty in ("", " \n\t", "\u3000", *unseen):
        with pytest.raises(EmptyRequest):
            clean_request(empty)


def test_one_visible_character_is_a_request() -> None:
    for text in ("\u200bx", "🦊\ufe0f", ".", "\u0301", "\ue000"):
        assert clean_request(text) == text


def test_numbers_of_numpy_are_numbers() -> None:
    command = Command("image", np.int64(5), np.uint8(9))  # type: ignore[arg-type]
    assert SCHEMA.check(command) == SCHEMA.check(Command("image", 5, 9))
    assert type(command.words) is int
    request = Request("a", words=np.int32(5), temperature=np.float32(0.5), seed=np.int64(7))  # type: ignore[arg-type]
    assert request == Request("a", words=5, temperature=0.5, seed=7)
    assert json.dumps(request.sampling.seed) == "7"
    with pytest.raises(BadSetting):
        SCHEMA.check(Command("image", np.bool_(True)))  # type: ignore[arg-type]


def test_nearest_support_is_commanded_with_a_warning() -> None:
    axis = SCHEMA.axis("words")
    support = {"image": {"words": {axis.value_of(n): 50 for n in (20, 25, 30)}}}
    schema = CommandSchema(SCHEMA.axes, support)
    far = schema.check(Command("image", 100))
    assert far.asked.words == 100
    assert far.commanded.words == axis.bounds(axis.value_of(30))[1]
    assert len(far.warnings) == 1
    assert "words 100" in far.warnings[0]
    assert "'image'" in far.warnings[0]
    near = schema.check(Command("image", 25))
    assert near.commanded == near.asked
    assert not near.warnings
    other = schema.check(Command("video", 100))
    assert not other.warnings, "nothing was recorded for this task"


def test_json_round_trip() -> None:
    assert CommandSchema.from_json(SCHEMA.to_json()) == SCHEMA


@pytest.mark.parametrize("data", [None, {}, {"axes": []}, {"axes": [{"name": "task"}]}])
def test_malformed_schema_is_refused(data: object) -> None:
    with pytest.raises(ManifestInvalid):
        CommandSchema.from_json(data)


@pytest.mark.parametrize(
    ("axis", "change"),
    [
        (0, {"values": [1, 2]}),
        (0, {"values": []}),
        (0, {"values": ["image", "image"]}),
        (0, {"values": ["any"]}),
        (0, {"values": ["ima|>ge"]}),
        (0, {"edges": [1, 2, 3]}),
        (0, {"kind": "bucket", "edges": [1, 2, 3]}),
        (1, {"kind": "category", "edges": []}),
        (1, {"values": ["1", "2"], "edges": ["a", "b", "c"]}),
        (1, {"values": ["1", "2"], "edges": [1, 3, 2]}),
        (1, {"values": ["1", "2"], "edges": [1, True, 2]}),
        (2, {"kind": "x"}),
    ],
)
def test_an_axis_of_another_shape_is_refused(axis: int, change: dict[str, object]) -> None:
    data = SCHEMA.to_json()
    data["axes"][axis].update(change)
    with pytest.raises(ManifestInvalid, match=r"axis|axes"):
        CommandSchema.from_json(data)


@pytest.mark.parametrize(
    "change",
    [
        *({"support": [1]}, {"support": {"image": {"words": 7}}}, {"support": {"image": 1}}),
        *({"support": {"image": {"words": {"1": -1}}}}, {"min_support": "20"}),
    ],
)
def test_a_support_of_another_shape_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ManifestInvalid, match="support"):
        CommandSchema.from_json({**SCHEMA.to_json(), **change})


@given(st.text())
def test_words_are_what_white_space_separates(text: str) -> None:
    assert count_words(text) == len(text.split())


def test_requests_in_the_case_of_their_task() -> None:
    plain = CommandSchema(default_axes(["tags", "title", "image"]))
    schema = CommandSchema(plain.axes, cases={"tags": "lower", "title": "title"}, spaced=True)
    assert CommandSchema.from_json(schema.to_json()) == schema
    assert {"cases", "spaced"}.isdisjoint(plain.to_json())
    assert "<|request|> icon: red fox<|task:tags|>" in schema.render(
        "Icon: Red  Fox", Command("tags")
    )
    assert "<|request|> The McDonald Farm<|" in schema.render("the McDonald farm", Command("title"))
    assert "<|request|> A Fox<|" in schema.render("A Fox", Command("image"))
    assert "<|request|> A Fox<|" in schema.render("A Fox", Command())
    for wrong in ({"cases": {"tags": "upper"}}, {"cases": ["tags"]}, {"spaced": 1}):
        with pytest.raises(ManifestInvalid):
            CommandSchema.from_json({**schema.to_json(), **wrong})
