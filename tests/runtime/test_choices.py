from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_slm_runtime import SLM, Request
from edge_slm_runtime.answer import Answer
from edge_slm_runtime.choices import Choices
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import BadSetting, NotSupportedByEngine
from edge_slm_runtime.plan import Plan
from edge_slm_runtime.sampling import Sampling
from edge_slm_runtime.text import TextCodec

TEXTS = ("a", "a b", "a bc", "yes", "no", "naïve café", "🦊", "la la la la la la la", "x.")


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5).map(tuple),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_an_answer_is_one_of_the_choices(
    codec: TextCodec, texts: tuple[str, ...], seed: int, greedy: bool
) -> None:
    rng = np.random.default_rng(seed)
    sampling = Sampling(0 if greedy else 1.0, repetition_penalty=1.5, seed=7)
    command = Command()
    answer = Answer(
        Plan(
            *("x", command, command, (), (1, 2)),
            budget=60,
            limit="max_tokens",
            words=None,
            stop=(),
            sampling=sampling,
            choices=texts,
        ),
        codec,
        0.0,
    )
    shown, done = "", False
    while not done:
        logits = rng.normal(0, 3, codec.size).astype(np.float32)
        step = answer.accept(answer.choose(logits))
        shown, done = shown + step.text, step.done
    assert shown == answer.text
    assert answer.text in texts
    assert answer.finish == "stop"


def test_the_end_is_a_choice_where_one_begins_another(codec: TextCodec) -> None:
    choices = Choices(["a", "a b"], codec.encode)
    (a,) = codec.encode("a")
    assert {*choices.next([], [9])} == {a, codec.encode(" a")[0]}
    assert {*choices.next([a], [9])} == {9, codec.encode("a b")[1]}
    assert choices.next(codec.encode("a b"), [9]) == [9]


def test_engines_choose(stepped_slm: SLM) -> None:
    texts = ["a red fox", "a red fox in the snow", "a cabin", "東京の夜景"]
    asked = [
        Request("a red fox", choices=texts),
        Request("a cabin", choices=texts, temperature=1.2, seed=3, words=2),
        Request("a fox", choices=["la la la la la la la la"]),
    ]
    for one, out in zip(asked, stepped_slm.generate_batch(asked), strict=True):
        assert out.text in one.choices
        assert out.finish_reason == "stop"
        stream = stepped_slm.stream(one)
        assert "".join(stream) == stream.result.text == stepped_slm.generate(one).text
    likelier = stepped_slm.generate(asked[0], logprobs=True)
    assert likelier.logprobs is not None
    assert len(likelier.logprobs) == len(likelier.token_ids)


def test_what_cannot_be_chosen_is_said(slm: SLM) -> None:
    for settings_, message in (
        ({"choices": ["a", " b"]}, "without spaces"),
        ({"choices": ["a"], "ban": "b"}, "ban has no meaning with choices"),
        ({"choices": ["a"] * 257}, "up to 256 texts"),
        ({"choices": ["a b c d e f g"], "max_new_tokens": 3}, "tokens, more than the 3"),
    ):
        if slm.variant.engine != "ctranslate2":
            with pytest.raises(BadSetting, match=message):
                slm.generate("a fox", **settings_)  # type: ignore[arg-type]
    if slm.variant.engine == "ctranslate2":
        with pytest.raises(NotSupportedByEngine, match="choose words"):
            slm.generate("a fox", choices=["a", "b"])


def test_a_choice_gets_no_prompt_syntax(stepped_slm: SLM) -> None:
    out = stepped_slm.generate("a (fox:1.2) <lora:x:1>", choices=["a fox", "a cabin"])
    assert out.text in ("a fox", "a cabin")
