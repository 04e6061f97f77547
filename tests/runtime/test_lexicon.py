"""Answers of known words alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_slm
from edge_slm_converters.bundle_writer import save_manifest
from edge_slm_runtime import SLM, Command, Request, load, read_manifest, verify
from edge_slm_runtime.answer import Answer
from edge_slm_runtime.bundle import WORDS, file_entry
from edge_slm_runtime.errors import BadSetting, ManifestInvalid
from edge_slm_runtime.lexicon import KnownWords, read_lexicon, words_in
from edge_slm_runtime.plan import Plan
from edge_slm_runtime.sampling import Sampling
from edge_slm_runtime.text import TextCodec

LEXICON = sorted(word.encode() for word in "a café cosy fox foxes in s snow snowfall the".split())
PIECES = ("a", " a", "b", " cab", " in", " the", " fo", "x", "c", "es", "sy", " snow", "fall")
PIECES += ("'", "s", "-", ",", ".", " ", "3", "é", "— ", "東", "The", " FOX")
REQUESTS = ("a red fox in the snow", "a zorblax cabin", "two old fishermen mending nets")


def file_of(words: list[bytes]) -> bytes:
    return b"".join(word + b"\n" for word in words)


def with_lexicon(bundle: Path, target: Path, content: bytes) -> Path:
    """A copy of a bundle with this words.txt."""
    shutil.copytree(bundle, target)
    (target / WORDS).write_bytes(content)
    manifest = read_manifest(target)
    files = {**manifest.files, WORDS: file_entry(target / WORDS)}
    save_manifest(replace(manifest, files=files), target)
    return target


def words_of_tokens(bundle: Path) -> list[bytes]:
    """Whole words that a bundle's tokenizer has a token for."""
    codec = TextCodec(bundle / "tokenizer.json", read_manifest(bundle).prompt)
    spelled = (codec.bytes_of(i) for i in range(codec.size))
    return sorted({one[1:].lower() for one in spelled if re.fullmatch(rb" [A-Za-z]+", one)})


def unknown(text: str, known: set[str]) -> list[str]:
    """Words of ASCII letters that are not known, found another way than `KnownWords` does."""
    found = re.findall(r"(?<![^\W])[^\W]+", text)
    return [
        word for word in found if word.isascii() and word.isalpha() and word.lower() not in known
    ]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a lexicon: half of the words that its tokenizer has a token for."""
    shipped = edge_slm.shipped_bundle()
    words = file_of(words_of_tokens(shipped)[::2])
    return with_lexicon(shipped, tmp_path_factory.mktemp("lexicon") / "bundle", words)


@pytest.fixture(scope="module")
def known(bundle: Path) -> set[str]:
    return set((bundle / WORDS).read_text("utf-8").split())


@pytest.fixture(scope="module")
def slm(bundle: Path) -> Iterator[SLM]:
    with load(bundle, "onnxruntime", "int8", threads=1) as loaded:
        yield loaded


def own(request: str) -> set[str]:
    words = set(request.lower().split())
    return words | {word + more for word in words for more in ("s", "es")}


def plan(codec: TextCodec, sampling: Sampling, **more: Any) -> Plan:
    command = Command(words=more.pop("words", None))
    known = KnownWords(LEXICON, codec, ["Zürich"])
    facts = {"budget": 30, "limit": "max_tokens", "stop": (), "words": command.words, **more}
    return Plan("x", command, command, (), (1, 2), sampling=sampling, known=known, **facts)


def written(codec: TextCodec, plan: Plan, seed: int) -> Answer:
    """An answer of random tokens, most of them PIECES; what is shown of it is its text."""
    rng, answer = np.random.default_rng(seed), Answer(plan, codec, 0.0)
    likely = [i for piece in PIECES for i in codec.encode(piece)] + list(codec.ends)
    ascii_ids = [i for i in range(codec.size) if codec.bytes_of(i).isascii()]
    shown, done = "", False
    while not done:
        logits = rng.normal(-50, 1, codec.size).astype(np.float32)
        logits[ascii_ids] += 50
        logits[likely] = rng.normal(6, 1, len(likely))
        step = answer.accept(answer.choose(logits))
        shown, done = shown + step.text, step.done
    assert shown == answer.text
    return answer


ASKED = st.fixed_dictionaries(
    {
        "words": st.sampled_from([None, 2, 6, 12]),
        "stop": st.sampled_from([(), ("sy",), ("ow",)]),
        "budget": st.integers(1, 40),
        "temperature": st.sampled_from([0, 1.0]),
    }
)


@settings(max_examples=150)
@given(asked=ASKED, seed=st.integers(0, 10**6))
def test_every_word_is_known(codec: TextCodec, asked: dict[str, Any], seed: int) -> None:
    sampling = Sampling(asked.pop("temperature"), no_repeat_ngram_size=0, seed=7)
    answer = written(codec, plan(codec, sampling, **asked), seed)
    spelled = {word.decode() for word in LEXICON} | {"zurich", "zurichs", "zuriches"}
    assert not unknown(answer.text, spelled), answer.text
    assert "\N{REPLACEMENT CHARACTER}" not in answer.text


@settings(max_examples=100)
@given(asked=ASKED, seed=st.integers(0, 10**6))
def test_no_dead_end(codec: TextCodec, asked: dict[str, Any], seed: int) -> None:
    """Where words that go on are banned, or blocked, other words are better than none."""
    sampling = Sampling(asked.pop("temperature"), no_repeat_ngram_size=2, seed=7)
    bans = ("fox", "snowfall", "-", "in", "'")
    answer = written(codec, plan(codec, sampling, ban=bans, **asked), seed)
    assert answer.finish
    assert not re.search(r"\b(fox|snowfall|in)\b", answer.text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        # Back to where the word began, and on from there; or there was no other token there.
        (",", ["c", "ca", "caf", ",", ",,", ",,,", ",,,,", ",,,,,"]),
        ("", ["c", "ca", "caf", "c", "c", "c", "c", "cb"]),
    ],
)
def test_a_word_that_cannot_go_on(codec: TextCodec, others: str, expected: list[str]) -> None:
    answer = Answer(plan(codec, Sampling(no_repeat_ngram_size=0)), codec, 0.0)
    texts, shown = [], ""
    for wish in "cafbbbbb":
        logits = np.full(codec.size, -np.inf, np.float32)
        logits[codec.encode(others)] = 1
        logits[codec.encode(wish)] = 2
        shown += answer.accept(answer.choose(logits)).text
        texts.append(answer.text)
    assert texts == expected
    assert codec.decode(answer.ids) == answer.text
    assert answer.text.startswith(shown)


def test_words_end_where_they_are_words(codec: TextCodec) -> None:
    known = KnownWords(LEXICON, codec, ["a Zorblax' naïve cats"])
    allowed = {
        "": ["a", "F", "S", "(", "3", "—", "東"],
        "the fox": ["es", " ", ",", "'", "-", "3", "東", "—"],
        "The FO": ["x", "X"],
        "caf": ["é"],
        "the snowf": ["a"],
        "zorblax": ["e", "s", "'"],
        "na": ["ï", "i"],
        "3d": ["q", " "],
        "a cat": ["s"],
        "zzz": ["z", " "],  # after a step without a choice
    }
    refused = {
        "": ["b", "q", "é"],
        "the fox": ["b", "é"],
        "The FO": [" ", "3", "東", "q", "."],
        "caf": [" ", "e"],
        "the snowf": ["l", "-"],
        "zorblax": ["q"],
        "na": ["q", " "],
        "a cat": [" "],
    }
    for tokens, expected in ((allowed, False), (refused, True)):
        for text, pieces in tokens.items():
            refuses = known.refusal(text, b"")
            for piece in pieces:
                assert refuses(codec.encode(piece)[0]) is expected, (text, piece)
    (end, *_) = codec.ends
    assert known.refusal("The fo", b"")(end)
    assert not known.refusal("The fox", b"")(end)
    # The first byte of an é, then its second.
    first, second = "é".encode()
    by_byte = {codec.bytes_of(i): i for i in range(codec.size)}
    assert not known.refusal("caf", b"")(by_byte[bytes([first])])
    assert not known.refusal("caf", bytes([first]))(by_byte[bytes([second])])
    assert known.refusal("fox", bytes([first]))(by_byte[bytes([second])])
    assert known.refusal("caf", b"")(by_byte[bytes([second])])
    texts = ("a fo", "a fox", "a fox ", "caf", "zzz")
    assert [known.without_torn(text) for text in texts] == ["a", "a fox", "a fox ", "", "zzz"]
    assert known.without_torn("a foxe", kept=5) == "a fox"


def test_words_of_texts() -> None:
    text = "It's Élan-driven, MP4 and 35mm; Café 東京tower x_y naïve"
    found = [word.decode() for word in words_in(text)]
    assert found == ["it", "s", "Élan", "driven", "mp", "and", "café", "x", "naïve"]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_model_keeps_to_known_words(slm: SLM, known: set[str], temperature: float) -> None:
    asked = [
        Request(text, task="image", words=words, temperature=temperature, seed=i)
        for i, (text, words) in enumerate(zip(REQUESTS * 2, (12, 30, 20, 8, 24, None), strict=True))
    ]
    free = list(slm.generate_batch(asked, known_words=False))
    held = list(slm.generate_batch(asked, 3))
    changed = 0
    for one, before, out in zip(asked, free, held, strict=True):
        assert not unknown(out.text, known | own(one.request)), out.text
        assert out.in_tolerance is not False
        assert out.token_ids == slm.generate(one).token_ids
        stream = slm.stream(one)
        assert "".join(stream) == stream.result.text == out.text
        changed += bool(unknown(before.text, known | own(one.request)))
        if not unknown(before.text, known | own(one.request)) and not temperature:
            assert before.text == out.text
    assert changed


def test_words_that_are_asked_for(slm: SLM, known: set[str]) -> None:
    text = "Vlorptastic"
    assert "vlorptastic" not in known
    assert text in slm.generate("a sign", task="image", words=12, keep=text).text
    assert slm.generate("a sign", choices=["Quxly", "Blorm"]).text in ("Quxly", "Blorm")
    short = slm.generate("a sign", task="image", max_new_tokens=5).text
    assert not unknown(short, known | own("a sign"))
    with pytest.raises(BadSetting, match="known_words"):
        slm.generate("a sign", known_words=1)


def test_without_a_lexicon_nothing_changes(slm: SLM) -> None:
    with edge_slm.load(threads=1, engine="onnxruntime") as bare:
        for request in REQUESTS:
            asked = {"task": "image", "words": 20}
            before = bare.generate(request, **asked).token_ids
            assert before == bare.generate(request, **asked, known_words=False).token_ids
            assert before == slm.generate(request, **asked, known_words=False).token_ids
        command = Command("image", 20)
        assert bare.greedy_ids("a fox", command, 24) == slm.greedy_ids("a fox", command, 24)


def test_guesses_change_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    words = words_of_tokens(tiny_bundle)[::2]
    bundle = with_lexicon(tiny_bundle, tmp_path / "bundle", file_of(words))
    answers, asked = [], {"max_new_tokens": 60, "no_repeat_ngram_size": 0}
    for speculate in (False, True):
        with load(bundle, "numba", "int8", threads=1, speculate=speculate) as slm:
            requests = ["a red fox", "a cabin in the snow", "a red fox"] * 2
            answers.append([slm.generate(one, **asked) for one in requests])
            free = slm.generate("a red fox", **asked, known_words=False)
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]
    assert sum(one.stats.guessed_tokens for one in answers[1]) > 0
    assert free.token_ids != answers[0][0].token_ids


@given(st.text("abé\n", max_size=9).map(str.encode))
def test_any_bytes_are_a_lexicon_or_none(content: bytes) -> None:
    try:
        words = read_lexicon(content)
    except ValueError:
        return
    assert words == sorted({*words})
    assert file_of(words) == content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"fox",
        b"fox\n\nsnow\n",
        b"Fox\n",
        b"fox\r\nsnow\r\n",
        b"snow\nfox\n",
        b"fox\nfox\n",
        b"two words\n",
        b"caf\xc3\n",
        b"x" * 65 + b"\n",
        b"a\n" * (1 << 19) + b"b\n",
    ],
)
def test_what_is_no_lexicon(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"word|larger|utf-8"):
        read_lexicon(content)
    broken = with_lexicon(edge_slm.shipped_bundle(), tmp_path / "bundle", content)
    for refusing in (verify, load):
        with pytest.raises(ManifestInvalid, match=r"words.txt is no lexicon"):
            refusing(broken)
