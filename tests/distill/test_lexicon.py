"""The words that a checkpoint's answers may have."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_slm.distill import lexicon
from edge_slm.distill.lexicon import lexicon_of
from edge_slm.distill.prepare import prepare
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.rewards import Keywords
from edge_slm.distill.samples import Sample
from edge_slm_runtime.errors import DataError
from edge_slm_runtime.lexicon import read_lexicon

SAMPLES = [
    Sample("a fox", "A red fox, it's snowing.", "image"),
    Sample("a vixen", "A red fox, it's snowing.", "image"),  # the same text: a vixen is no word
    Sample("", "The Café's fox in 8k and mp4; foxx", "image"),
    Sample("snowing hard", "café, REDDISH red", "tags"),
]


def test_words_of_several_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lexicon_of(SAMPLES) == b""  # so few are no vocabulary
    monkeypatch.setattr(lexicon, "_LEAST", 5)
    assert lexicon_of(SAMPLES).decode().split() == ["café", "fox", "red", "s", "snowing"]


def test_words_of_a_checkpoint_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexicon, "_LEAST", 5)
    assert lexicon_of(SAMPLES, str(tmp_path)) == lexicon_of(SAMPLES)  # it has none
    (tmp_path / "words.txt").write_bytes(b"fox\nvixen\n")
    words = lexicon_of(SAMPLES, str(tmp_path)).decode().split()
    assert words == ["café", "fox", "red", "s", "snowing", "vixen"]
    (tmp_path / "words.txt").write_bytes(b"Vixen")
    with pytest.raises(DataError, match=r"words\.txt"):
        lexicon_of(SAMPLES, str(tmp_path))


def test_training_texts_are_its_source(
    recipe: Recipe, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(recipe, [data_file], Keywords()).lexicon == b""
    monkeypatch.setattr(lexicon, "_LEAST", 10)
    words = read_lexicon(prepare(recipe, [data_file], Keywords()).lexicon)
    assert {b"lighthouse", b"muted"} <= {*words}
    assert b"kite" not in words  # of one text
