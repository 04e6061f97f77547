from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_slm_converters import convert
from edge_slm_runtime import SLM, Command, Request, load
from edge_slm_runtime.answer import Answer
from edge_slm_runtime.command import count_words
from edge_slm_runtime.errors import BadSetting, NotSupportedByEngine
from edge_slm_runtime.keeps import Keeps, texts_to_show
from edge_slm_runtime.length import tolerance
from edge_slm_runtime.plan import Plan
from edge_slm_runtime.sampling import Sampling
from edge_slm_runtime.text import TextCodec

from .test_bans import holds

PHRASES = ("in the", "Cosy cabin", "c++", "n", "35mm, f/2", "naïve", "snow")
BANS = ((), ("a",), (",", "b"), (",", ";", "b"), ("the a", "nn"), ("x, n",))


def has(text: str, phrase: str) -> bool:
    left = r"(?<!\w)" if phrase[0].isalnum() else ""
    right = r"(?!\w)" if phrase[-1].isalnum() else ""
    return re.search(left + re.escape(phrase) + right, text) is not None


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(PHRASES), min_size=1, max_size=3, unique=True).map(tuple),
    st.sampled_from(BANS),
    st.integers(0, 10**6),
    st.sampled_from([None, 7, 12, 20]),
    st.booleans(),
)
def test_every_phrase_is_kept_within_the_length(
    codec: TextCodec,
    keep: tuple[str, ...],
    ban: tuple[str, ...],
    seed: int,
    words: int | None,
    greedy: bool,
) -> None:
    if any(holds(phrase, one) for phrase in keep for one in ban):
        return  # refused beforehand
    rng = np.random.default_rng(seed)
    command = Command(words=words)
    sampling = Sampling(0 if greedy else 1.0, seed=7)
    answer = Answer(
        Plan(
            *("x", command, command, (), (1, 2)),
            budget=60 if words is None else 400,
            limit="max_tokens",
            words=words,
            stop=(),
            sampling=sampling,
            ban=ban,
            keep=keep,
        ),
        codec,
        0.0,
    )
    pieces = ("a", " a", " cab", "in", " in", " the", " n", "n", " snow", ",", ".", " ", "Co")
    likely = [i for piece in pieces for i in codec.encode(piece)] + list(codec.ends)
    shown, done = "", False
    while not done:
        logits = rng.normal(0, 1, codec.size).astype(np.float32)
        logits[likely] += 6
        step = answer.accept(answer.choose(logits))
        shown, done = shown + step.text, step.done
    assert shown == answer.text
    assert not [phrase for phrase in keep if not has(answer.text, phrase)]
    assert not list(answer.warnings())
    assert not [one for one in ban if holds(answer.text, one)]
    if words is not None:
        low, high = tolerance(words)
        assert low <= count_words(answer.text) <= high
    written = codec.decode(answer.ids).lstrip()
    added = answer.finish == "length" and not written.startswith(answer.text)  # a full stop
    assert written.startswith(answer.text.removesuffix(".") if added else answer.text)


def test_phrases_are_put_behind_what_fits(codec: TextCodec) -> None:
    keeps = Keeps(["a b", "c"], codec.encode)

    def added(text: str, *wrong: str) -> str:
        return codec.decode(keeps.ids(text, ["a b", "c"], lambda t: not {*wrong} & {*t}))

    assert added("") == "a b, c"
    assert added("the snow") == ", a b, c"
    assert added("the snow", ",") == "; a b; c"
    assert added("the snow.") == " a b, c"
    assert added("the snow ") == "a b, c"
    assert added("the snow", "a") == ""
    assert keeps.missing("a bc, c") == ["a b"]
    assert keeps.end("x a b, c, d") == len("x a b, c")


@pytest.mark.parametrize("words", [None, 9])
def test_engines_keep_phrases(stepped_slm: SLM, words: int | None) -> None:
    asked = [
        Request("a red fox", words=words, max_new_tokens=60),
        Request("a cabin", words=words, max_new_tokens=60, temperature=1.2, seed=3),
    ]
    settings = {"keep": ["Golden hour", "35mm"], "ban": "a"}
    for one, out in zip(asked, stepped_slm.generate_batch(asked, **settings), strict=True):
        assert has(out.text, "Golden hour")
        assert has(out.text, "35mm")
        assert out.in_tolerance is not False or out.finish_reason == "max_tokens"
        stream = stepped_slm.stream(one, **settings)
        assert "".join(stream) == stream.result.text
        if stepped_slm.variant.name != "onnx-int4":  # whose kernels round by the batch
            assert stream.result.token_ids == out.token_ids


def test_what_cannot_be_kept_is_said(stepped_slm: SLM) -> None:
    for asked, message in (
        ({"keep": "red fox", "ban": "fox"}, "which ban forbids"),
        ({"keep": "red fox", "stop": "fo"}, "which a stop ends"),
        ({"keep": "a b c d e f", "words": 3}, "6 words, more than the 5 of words 3"),
        ({"keep": "a b c d e f", "max_new_tokens": 3}, "tokens, more than the 3"),
        ({"keep": " fox"}, "without spaces"),
        ({"keep": ["x"] * 17}, "up to 16 texts"),
    ):
        with pytest.raises(BadSetting, match=message):
            stepped_slm.generate("a fox", **asked)  # type: ignore[arg-type]
    stop = stepped_slm.generate("a fox", max_new_tokens=20).text[3]
    out = stepped_slm.generate("a fox", keep="Zürich", stop=stop, max_new_tokens=40)
    assert out.finish_reason == "stop_sequence"
    assert out.warnings == ("the answer ended before these were in it: Zürich",)


def test_engines_with_loops_of_their_own_keep_nothing(slm: SLM) -> None:
    if slm.variant.engine == "ctranslate2":
        with pytest.raises(NotSupportedByEngine, match="cannot ban, keep or choose words"):
            slm.generate("a fox", keep="fox")


@pytest.mark.parametrize(
    ("request_", "texts"),
    [
        ("Fresh Bread", ("Fresh Bread",)),
        ('A sign with "OPEN" and “24 h”', ("OPEN", "24 h")),
        ('"Sale"', ("Sale",)),
        ('a "" sign', ('a "" sign',)),
    ],
)
def test_texts_to_show(request_: str, texts: tuple[str, ...]) -> None:
    assert texts_to_show(request_) == texts


def test_a_quotation_is_begun_with_what_is_missing(codec: TextCodec) -> None:
    keeps = Keeps(("Open", "now", "fox"), codec.encode, ("Open", "now"))

    def put_in(text: str, *phrases: str) -> str:
        return codec.decode(keeps.quoted(text, phrases, lambda _: True))

    assert put_in('a sign: "', "Open", "now") == 'Open"'
    assert put_in("a sign: “", "now") == "now”"
    assert put_in('a sign: "Open"', "now") == ""
    assert put_in("a sign", "now") == ""
    assert put_in('a sign: "', "fox") == ""
    assert put_in('a sign: "', "fox", "now") == 'now"'
    assert keeps.quoted('a sign: "', ("Open",), lambda _: False) == []


@pytest.mark.parametrize(
    ("text", "behind"),
    [
        ("a sign", ', with the text "Open"'),
        ("a sign.", ' The text reads "Open".'),
        ("a sign,", ' with the text "Open"'),
        ("a sign with the English words", ' "Open"'),
        ("", 'The text reads "Open".'),
    ],
)
def test_a_text_to_show_is_put_in_between_marks(codec: TextCodec, text: str, behind: str) -> None:
    keeps = Keeps(("Open",), codec.encode, ("Open",))
    assert codec.decode(keeps.ids(text, ["Open"], lambda _: True)) == behind
    assert keeps.words(["Open"]) == 4


def test_a_grammar_names_tasks_whose_requests_are_shown(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    grammar = json.loads((copy / "command.json").read_text())
    (copy / "command.json").write_text(json.dumps({**grammar, "verbatim": ["title"]}))
    convert(copy, tmp_path / "b", ("onnx-fp32",))
    with load(tmp_path / "b", threads=1) as slm:
        asked = {"words": 12, "max_new_tokens": 90}
        assert "Fresh Bread" in slm.generate("Fresh Bread", task="title", **asked).text
        assert "Fresh Bread" not in slm.generate("Fresh Bread", task="image", **asked).text
        alone = slm.generate("Fresh Bread", task="title", **asked, keep_length=False)
        assert "Fresh Bread" not in alone.text
        assert not slm.check(Request("Brot und Wein mit uns", task="title", words=12)).warnings
        (warning,) = slm.generate("a b c d e f", task="title", words=3).warnings
        assert warning.startswith("the text to show may not be in the answer: keep has 9 words")
