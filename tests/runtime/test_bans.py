from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_slm_runtime import SLM, Command, Request, load
from edge_slm_runtime.answer import Answer
from edge_slm_runtime.bans import Bans, units
from edge_slm_runtime.errors import BadSetting, NotSupportedByEngine
from edge_slm_runtime.plan import Plan
from edge_slm_runtime.sampling import Sampling
from edge_slm_runtime.text import TextCodec

PHRASES = ("a", "co", "Cosy", "cabin", "cabi", "in the", "a b", "c++", ",", "n", "nn", "snow, a")
# Pieces that spell the phrases, with and without what makes another word of them.
PIECES = ("a", " a", "b", " cab", "in", " in", " the", "n", "co", "sy", " snow", ",", "+", " ", ".")


def holds(text: str, phrase: str) -> bool:
    """Whether a text has a phrase, found another way than `Bans` does."""
    parts = re.findall(r"\w+|[^\w\s]", phrase)
    body = r"\s*".join(map(re.escape, parts))
    body = re.sub(r"(?<=\w)\\s\*(?=\w)", r"\\s+", body)
    left = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    right = r"(?!\w)" if re.search(r"\w$", phrase) else ""
    return re.search(left + body + right, text, re.IGNORECASE) is not None


def plan(ban: tuple[str, ...], sampling: Sampling, words: int | None, stop: str) -> Plan:
    command = Command(words=words)
    stops = (stop,) if stop else ()
    return Plan(
        "x", command, command, (), (1, 2), 30, "max_tokens", words, stops, sampling, ban=ban
    )


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(PHRASES), min_size=1, max_size=4).map(tuple),
    st.integers(0, 10**6),
    st.sampled_from([None, 2, 6]),
    st.sampled_from(["", "sy", "n"]),
    st.booleans(),
    st.sampled_from([0, 2]),
)
@example(("Cosy", "nn", ","), 804, None, "sy", True, 0)  # its end joins what was shown
def test_no_answer_has_a_banned_phrase(
    codec: TextCodec,
    ban: tuple[str, ...],
    seed: int,
    words: int | None,
    stop: str,
    greedy: bool,
    ngram: int,
) -> None:
    rng = np.random.default_rng(seed)
    sampling = Sampling(0 if greedy else 1.0, no_repeat_ngram_size=ngram, seed=7)
    answer = Answer(plan(ban, sampling, words, stop), codec, 0.0)
    likely = [i for piece in PIECES for i in codec.encode(piece)] + list(codec.ends)
    banned = [i for phrase in ban for text in (phrase, f" {phrase}") for i in codec.encode(text)]
    shown, steps, done = "", 0, False
    while not done:
        logits = rng.normal(0, 1, codec.size).astype(np.float32)
        logits[likely] += 6
        logits[banned] += 2
        step = answer.accept(answer.choose(logits))
        shown, done, steps = shown + step.text, step.done, steps + 1
        assert steps < 5000
    assert not [phrase for phrase in ban if holds(answer.text, phrase)], answer.text
    assert shown == answer.text
    # Tokens and text agree: what was taken back left nothing in either.
    assert codec.decode(answer.ids).lstrip().startswith(answer.text)


@given(st.lists(st.sampled_from((*PIECES, "é", "_", "Co")), max_size=12).map("".join))
def test_phrases_are_found_when_they_are_certain(text: str) -> None:
    for phrase in PHRASES:
        bans = Bans([phrase])
        found = any(bans.closed(text[: i + 1], i) is not None for i in range(len(text)))
        assert (found or bans.open(text)) == holds(text, phrase), phrase
        assert bans.closed(f"{text} ", 0) is not None or not holds(text, phrase)
        assert not holds(bans.without_open(text).rstrip(), phrase) or found


def test_a_word_that_goes_on_is_allowed(codec: TextCodec) -> None:
    """What the model wants is taken back only if it is the banned word after all."""
    c, s, b, comma = (codec.encode(text)[0] for text in "csb,")
    answer = Answer(plan(("c", "b, b"), Sampling(no_repeat_ngram_size=0), None, ""), codec, 0.0)
    written = []
    for wish, second in (
        (c, b),
        (s, b),
        (comma, b),
        (c, b),
        (comma, s),
        (comma, s),
        (b, s),
        (comma, c),
    ):
        logits = np.zeros(codec.size, np.float32)
        logits[[wish, second]] = 9, 8
        written.append((answer.accept(answer.choose(logits)).text, answer.text))
    assert written == [
        ("", "c"),
        ("cs", "cs"),
        (",", "cs,"),
        ("", "cs,c"),
        ("b", "cs,b"),
        (",", "cs,b,"),
        ("", "cs,b,b"),
        ("s", "cs,b,s"),
    ]
    assert codec.decode(answer.ids) == "cs,b,s"


def test_words_are_compared_not_letters() -> None:
    assert units("Art-Déco,  naïve") == ("art", "-", "déco", ",", "naïve")
    bans = Bans(["art", "New  York"])
    for text in ("artist, start ", "new yorkers ", "New Jersey, York "):
        assert bans.closed(text, 0) is None, text
    for text in ("ART ", "an art-deco", "(art)", "new\nyork."):
        assert bans.closed(text, 0) is not None, text


@pytest.mark.parametrize("words", [None, 12])
def test_engines_write_no_banned_word(stepped_slm: SLM, words: int | None) -> None:
    asked = [
        Request("a red fox", words=words, max_new_tokens=40),
        Request("a cabin", words=words, max_new_tokens=40, temperature=1.2, seed=3),
        Request("a cosy cabin in the snow", words=words, max_new_tokens=40),
    ]
    free = list(stepped_slm.generate_batch(asked))
    ban = sorted({word for one in free for word in re.findall(r"\w+", one.text)})[::2]
    held = list(stepped_slm.generate_batch(asked, ban=ban))
    for one, out, before in zip(asked, held, free, strict=True):
        assert not [word for word in ban if holds(out.text, word)]
        assert out.text != before.text
        stream = stepped_slm.stream(one, ban=ban)
        assert "".join(stream) == stream.result.text == stepped_slm.generate(one, ban=ban).text
        if stepped_slm.variant.name != "onnx-int4":  # whose kernels round by the batch
            assert stream.result.token_ids == out.token_ids
            unneeded = stepped_slm.generate(one, ban=["Zürich"])
            assert unneeded.token_ids == before.token_ids


def test_guesses_change_nothing(tiny_bundle: Path) -> None:
    asked = ["a red fox", "a cabin in the snow", "a red fox"]
    answers = []
    for speculate in (False, True):
        with load(tiny_bundle, "numba", "int8", threads=1, speculate=speculate) as slm:
            free = [slm.generate(one, max_new_tokens=60, no_repeat_ngram_size=0) for one in asked]
            ban = sorted({word for one in free for word in re.findall(r"\w+", one.text)})[1::3]
            settings = {"max_new_tokens": 60, "no_repeat_ngram_size": 0, "ban": ban}
            answers.append([slm.generate(one, **settings) for one in asked * 2])
            assert not [w for w in ban for one in answers[-1] if holds(one.text, w)]
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]
    assert sum(one.stats.guessed_tokens for one in answers[1]) > 0


def test_what_cannot_be_banned(slm: SLM) -> None:
    for bad in ([""], " \n", ["x" * 257], ["a"] * 10_001, [1], {"a"}):
        with pytest.raises(BadSetting, match="ban"):
            slm.generate("a fox", ban=bad)  # type: ignore[arg-type]
    if slm.variant.engine == "ctranslate2":
        with pytest.raises(NotSupportedByEngine, match="cannot ban, keep or choose words"):
            slm.generate("a fox", ban="fox")
