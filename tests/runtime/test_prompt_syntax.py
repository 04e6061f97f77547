from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_slm_runtime import SLM, Request
from edge_slm_runtime.command import count_words
from edge_slm_runtime.errors import BadSetting, EmptyRequest
from edge_slm_runtime.prompt_syntax import Placer, shield

WORDS = ("a", "red", "knight", "glowing", "sword", "in", "the", "Forest", "art-deco", "naïve")
FORMS = (
    "<lora:style{i}:0.8>",
    "({w}{i}:1.2)",
    "(({w}{i}))",
    "[{w}|b{i}]",
    "{{{w}|{{b|c}}{i}}}",
    "__{w}{i}__",
    "[{w} {i}]",
    "[{w}:dog{i}:0.5]",
    "(a {{2$$red|blue}} {w}:1.{i}1)",
    "(a <lora:in{i}:1> {w}:1.1)",
    "--ar {i}:9",
    "--style{i}",
)
plain = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
answers = st.lists(st.sampled_from((*WORDS, "Red,", "sword.", "swords", "dog")), max_size=30)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A request and its constructs, each of them another one."""
    found = [
        draw(st.sampled_from(FORMS)).format(i=i, w=draw(st.sampled_from(WORDS)))
        for i in range(draw(st.integers(1, 6)))
    ]
    found += ["BREAK"] * draw(st.integers(0, 1))
    found = draw(st.permutations(found))
    glue = st.sampled_from((" ", ", ", " , "))
    between = "".join(f" {draw(plain)}{draw(glue)}{one} " for one in found)
    return f"a knight {between} {draw(plain)}", found


@settings(max_examples=300)
@given(requests(), answers.map(" ".join), st.data())
def test_every_construct_comes_back_once(
    asked: tuple[str, list[str]], answer: str, data: st.DataObject
) -> None:
    request, constructs = asked
    shielded = shield(request)
    assert not any(mark in shielded.text for mark in "<>{}[]()|:"), shielded
    assert all(f" {mark} " not in f" {shielded.text} " for mark in ("BREAK", ",", "--ar"))
    whole = shielded.restored(answer)
    assert [whole.count(one) for one in constructs] == [1] * len(constructs)
    # As it is written, piece by piece, the text is the same.
    placer, text, at = Placer(shielded), "", 0
    while at < len(answer):
        size = data.draw(st.integers(1, 12))
        text += placer.push(answer[at : at + size], last=False)
        assert whole.startswith(text)
        at += size
    assert text + placer.push("", last=True) == whole


@given(st.text(st.sampled_from("ab ,.:-_#|'\"é()") | st.characters(codec="utf-8"), max_size=60))
def test_text_without_constructs_is_unchanged(text: str) -> None:
    shielded = shield(text.replace("[", "").replace("{", "").replace("<", "").replace("_", ""))
    if not (shielded.slots or shielded.tail):
        assert shielded.text == text.translate({ord(c): None for c in "[{<_"})
        assert shielded.restored("An answer.") == "An answer."


@pytest.mark.parametrize(
    "text",
    [
        "a plain (round) request: 4:3, 50% off -- and that",
        "a clock (at 12:30), a frame (16:9), a page (localhost:8080)",
        "BREAK THE RULES",
        r"cat \(animal\:1.2\)",
        '{"subject": "cat", "style": ["old", "new"]}',
        "a cat--or a dog, x < y, snake_case",
    ],
)
def test_what_only_resembles_syntax_is_text(text: str) -> None:
    assert shield(text) == (text, (), ())


@pytest.mark.parametrize(
    ("request_", "told", "answer", "whole"),
    [
        (
            "a knight, (glowing sword:1.3), __armour__, <lora:ink_style:0.7>",
            "a knight, glowing sword, armour",
            "A knight with a Glowing Sword, in armour.",
            "A knight with a (glowing sword:1.3), in __armour__. <lora:ink_style:0.7>",
        ),
        (  # what the answer does not have is added
            "a knight, (glowing sword:1.3), __armour__ --ar 16:9 --no dogs, cats",
            "a knight, glowing sword, armour",
            "a knight in the snow",
            "a knight in the snow, (glowing sword:1.3), __armour__ --ar 16:9 --no dogs, cats",
        ),
        (  # a tag between words follows its word; parameters are always last
            "--v 6 <lora:a:1> a castle <lora:b:1> on a hill BREAK a dragon",
            "a castle on a hill, a dragon",
            "A dragon over a castle, far away",
            "A dragon over a castle <lora:b:1>, far away BREAK <lora:a:1> --v 6",
        ),
        (  # the longest at a place, the next occurrence for the next
            "(sword:1.2) and (sword of fire:1.1) and (sword:0.9)",
            "sword and sword of fire and sword",
            "sword of fire, swords, sword, sword",
            "(sword of fire:1.1), swords, (sword:1.2), (sword:0.9)",
        ),
        (  # of alternatives the first that says something
            "{the|a} cat, [:dog:0.5], {2$$0.5::red|blue} [a bird:1.1] __pets/small-dogs__",
            "the cat, dog, red a bird small dogs",
            "The dog.",
            "The [:dog:0.5]. {the|a}, {2$$0.5::red|blue}, [a bird:1.1], __pets/small-dogs__",
        ),
        ("(fog:-1) (cat2:1.2) (dog: 2 )", "fog cat2 dog", "Dog", "(dog: 2 ), (fog:-1), (cat2:1.2)"),
        ("cat [x]", "cat x", "", "[x]"),
    ],
)
def test_where_constructs_belong(request_: str, told: str, answer: str, whole: str) -> None:
    shielded = shield(request_)
    assert shielded.text == told
    assert shielded.restored(answer) == whole


def test_nothing_but_syntax_is_an_empty_request() -> None:
    with pytest.raises(EmptyRequest, match="syntax='none'"):
        shield("<lora:x:1> --ar 16:9")
    with pytest.raises(BadSetting, match="more than 64"):
        shield("a cat" + " [x]" * 65)


@pytest.mark.parametrize("text", ["(" * 9999, "{[" * 5000 + "|" + "]}" * 5000, "--no " * 4000])
def test_hostile_requests_take_little_time(text: str) -> None:
    with pytest.raises(BadSetting):
        shield(text + "[a]" * 65)


def test_a_model_never_sees_it(slm: SLM) -> None:
    asked = Request("a knight, (glowing sword:1.3), <lora:ink:0.7>", task="image", words=8)
    bare = slm.generate("a knight, glowing sword", task="image", words=8)
    out = slm.generate(asked)
    assert out.token_ids == bare.token_ids
    assert out.text.startswith(bare.text)
    assert out.text.endswith(" (glowing sword:1.3) <lora:ink:0.7>")
    assert out.request == asked.request
    assert (out.words, out.in_tolerance) == (count_words(bare.text), bare.in_tolerance)
    stream = slm.stream(asked)
    assert "".join(stream) == stream.result.text == out.text
    assert slm.check(Request("a [b] c", syntax="none")).syntax is None
    raw = slm.generate("a [b] c", words=6, syntax="none")
    assert "[b]" not in raw.text
    assert raw.token_ids != slm.generate("a [b] c", words=6).token_ids
    with pytest.raises(BadSetting, match="syntax"):
        slm.check(Request("a cat", syntax="no"))


def test_a_closed_stream_has_what_it_gave(stepped_slm: SLM) -> None:
    stream = stepped_slm.stream("a [knight] <lora:x:1> in (snow:1.2)", words=20)
    given = next(stream) + next(stream)
    stream.close()
    assert stream.result.text == given
