"""The data of a model: which rows are read, where texts end, levels, rewards, vocabularies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm.distill.cuts import whole_cuts, with_full_stop
from edge_slm.distill.levels import Levels, level_edges
from edge_slm.distill.precision import use_bf16
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.rewards import Fluency, Gated, Keywords
from edge_slm.distill.samples import Sample, load_samples, read_samples
from edge_slm.distill.split import Reading, held_out
from edge_slm.distill.tokenizer import train_tokenizer, trimmed
from edge_slm.distill.variants import vary
from edge_slm_runtime.command import CommandSchema, default_axes

from .conftest import made_samples


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ('He said "go." Then he left. The end', ['He said "go."', 'He said "go." Then he left.']),
        (
            "a fox, soft light, high detail, 4k",
            ["a fox, soft light", "a fox, soft light, high detail"],
        ),
        ("A man walks, because the bus that he waited for never came, home", []),
        ("A fox at 3.5 metres, e.g. near", []),
        ("One sentence.", []),
    ],
)
def test_cuts_are_whole(text: str, cuts: list[str]) -> None:
    assert whole_cuts(text) == cuts


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("a fox sits", "a fox sits."),
        ('it reads "Hello"', 'it reads "Hello".'),
        ('it reads "Hello."', 'it reads "Hello."'),
        ("a fox, soft light, high detail, 4k", "a fox, soft light, high detail, 4k"),
        ("Why?", "Why?"),
    ],
)
def test_sentences_get_a_full_stop(text: str, ended: str) -> None:
    assert with_full_stop(text) == ended


def test_rows_are_read_as_the_recipe_says(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        ("a fox", "a fox sits. It is red and it looks at the snow", "image", "good/one@1"),
        ("a cat", "a cat sits", "tags", "good/one@1"),
        ("a dog", "a dog", "image", "bad/two@1"),
    ]
    keys = ("request", "response", "task", "source")
    file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    reading = Reading(4, leave_out=("bad/",), longest=6, sentences=("image",))
    assert list(read_samples([file], reading=reading)) == [
        Sample("a fox", "a fox sits.", "image"),
        Sample("a cat", "a cat sits", "tags"),
    ]
    old = {"holdout_percent": 4}  # of a recipe before these settings
    assert Reading.of(old) == Reading(4)


def test_a_fault_goes_with_its_text(tmp_path: Path) -> None:
    def read(response: str, fault: str) -> list[tuple[str, str]]:
        row = {"request": "a", "response": response, "task": "image", "quality": 0, "fault": fault}
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row), "utf-8")
        reading = Reading(longest=6)
        return [(s.response, s.fault) for s in read_samples([file], reading=reading)]

    assert read("One  two. It\nran.", "It\nran.") == [("One two. It ran.", "It ran.")]
    assert read('One two. It is "x', 'It is "x') == [('One two. It is "x', 'It is "x')]
    assert read('One two. It ran."', 'It ran."') == [("One two. It ran.", "It ran.")]
    long = "One two three four five. Six seven."
    assert read(long, "One two three four five.")[0][0] == "One two three four five."
    assert read(long, "Six seven.") == []  # what is left is good


def test_dev_and_test_are_apart_and_the_mix_is_kept(data_file: Path, recipe: Recipe) -> None:
    data = recipe.data.model_copy(
        update={
            "holdout_percent": 10,
            "dev_percent": 15,
            "words": 400,
            "mix": {"image": 0.75, "tags": 0.25},
        }
    )
    train, dev, _ = load_samples([data_file], data, seed=1)
    assert dev
    assert not any(held_out(s.request, 10) for s in dev)
    assert all(held_out(s.request, 25) for s in dev)
    assert not any(held_out(s.request, 25) for s in train)
    words = Counter[str]()
    for sample in train:
        words[sample.task] += sample.words
    assert 270 <= words["image"] <= 300
    assert 85 <= words["tags"] <= 100


def test_shares_of_variants_are_bounds(recipe: Recipe) -> None:
    pairs = made_samples(400)
    long = [
        Sample(s.request, f"{s.response}. It is seen from afar. Soft light", s.task) for s in pairs
    ]
    settings = {"cut_share": 0.1, "fragment_share": 0.05, "mismatch_share": 0.04}
    pool = vary(long, [], recipe.hindsight.model_copy(update=settings), 0, 3)
    kinds = Counter(sample.kind for sample in pool)
    words = sum(sample.words for sample in pool)
    assert 0 < sum(s.words for s in pool if s.kind == "cut") <= 0.101 * words
    assert 0 < kinds["fragment"] <= 0.051 * sum(kinds.values())
    assert 0 < kinds["mismatch"] <= 0.041 * sum(kinds.values())
    assert all(s.response.endswith(".") for s in pool if s.kind == "cut")


def test_levels_of_bands_do_not_depend_on_the_length() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(3, 60, 4000)
    samples = [Sample("r", " ".join(["w"] * int(n)), "image") for n in words]
    rewards = (1 / words + rng.random(4000) / 50).astype(np.float32)  # short texts score higher
    for bands, most in ((1, -0.9), (8, -0.35)):
        levels = level_edges(samples, rewards, 5, bands=bands)["image"]
        got = [levels.of(r, s.words) for r, s in zip(rewards.tolist(), samples, strict=True)]
        assert min(Counter(got).values()) > 400
        assert (np.corrcoef(words, got)[0, 1] < most) == (bands == 1)
        assert Levels.from_json(json.loads(json.dumps(levels.to_json()))) == levels


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 6))
def test_every_length_has_a_level(words: list[int], bands: int) -> None:
    samples = [Sample("r", " ".join(["w"] * n), "image") for n in words]
    rewards = np.linspace(0, 1, len(words)).astype(np.float32)
    levels = level_edges(samples, rewards, 4, bands=bands)["image"]
    assert len(levels.rewards) == len(levels.words) + 1 <= bands
    assert all(0 <= levels.of(r, n) <= 3 for r in (-1.0, 0.5, 2.0) for n in (1, 5, 99))


def test_fluency_is_a_gate() -> None:
    reward = Gated([(1.0, Keywords())], Fluency())
    good = Sample("a red fox", "A red fox crosses the snow at dusk.", "image")
    loop = Sample("a red fox", "A red fox" + " and the snow" * 9, "image")
    scores = reward.score([good, loop])
    assert scores[0] == pytest.approx(1)
    assert scores[1] < 0.2
    parts = {"keywords": np.ones(2, np.float32), "fluency": np.array([1, 0.5], np.float32)}
    assert reward.combine(parts).tolist() == [1, 0.5]
    with_cosine = Gated([(1.0, _Named("relevance"))], Fluency())
    parts = {"relevance": np.array([0.7, 0.9, 0.35, -1]), "fluency": np.ones(4)}
    assert with_cosine.combine(parts).tolist() == pytest.approx([1, 1, 0.5, 0])


class _Named(Keywords):
    def __init__(self, name: str) -> None:
        self.name = name


def test_a_trimmed_tokenizer_writes_any_text() -> None:
    from tokenizers import Tokenizer

    texts = [s.response for s in made_samples(200)]
    schema = CommandSchema(default_axes(["image"]))
    whole = json.loads(train_tokenizer(texts, schema, 700).to_str())
    small = trimmed(whole, texts, 400)
    tokenizer = Tokenizer.from_str(json.dumps(small))
    assert tokenizer.get_vocab_size() <= 400
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    for text in (*texts[:20], "naïve 東京 🦊 zzz"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    full = Tokenizer.from_str(json.dumps(trimmed(whole, texts, 10_000)))
    assert (
        full.encode(texts[0]).tokens
        == Tokenizer.from_str(json.dumps(whole)).encode(texts[0]).tokens
    )


def test_precision() -> None:
    assert use_bf16("bf16")
    assert not use_bf16("fp32")
    assert use_bf16("auto") == use_bf16("auto")
