from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm.distill.tokenizer import train_tokenizer
from edge_slm_runtime.command import CommandSchema, default_axes

from .conftest import made_samples

SCHEMA = CommandSchema(default_axes(["image", "tags"]))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = train_tokenizer([s.response for s in made_samples(100)], SCHEMA, 512)
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_control_tokens_are_the_first_ids(tokenizer: Any) -> None:
    specials = SCHEMA.special_tokens()
    assert [tokenizer.token_to_id(token) for token in specials] == list(range(len(specials)))


@given(text=st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_round_trips_without_control_ids(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(i >= len(SCHEMA.special_tokens()) for i in ids)
