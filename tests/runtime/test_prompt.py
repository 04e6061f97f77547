"""Prompt forms: chat and plain models through the same calls as commanded ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm_runtime import SLM, CommandSchema, PromptForm, Request, load, read_manifest, verify
from edge_slm_runtime.bundle import MANIFEST, TOKENIZER
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import (
    BadSetting,
    ControlTokenInRequest,
    EmptyRequest,
    ManifestInvalid,
    NoCommandGrammar,
)
from edge_slm_runtime.request_text import is_visible
from edge_slm_runtime.text import TextCodec

from .conftest import VARIANTS

# The tiny tokenizer's own control tokens serve as the marks of a chat.
CHAT = PromptForm(
    "chat",
    ends=("<|response|>", "<|end|>"),
    before="<|request|>system\nBe brief.<|response|>\n<|request|>user\n",
    after="<|response|>\n<|request|>assistant\n",
)
PLAIN = PromptForm("plain", ends=("<|end|>",), before="<|request|>")
FORMS = pytest.mark.parametrize("form", [CHAT, PLAIN], ids=lambda form: form.kind)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)))


@pytest.fixture(scope="module")
def bundle_of(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[PromptForm], Path]:
    """The tiny bundle under another form; made once each."""
    made: dict[str, Path] = {}

    def make(form: PromptForm) -> Path:
        if form.kind not in made:
            made[form.kind] = folder = tmp_path_factory.mktemp("forms") / form.kind
            shutil.copytree(tiny_bundle, folder)
            manifest = replace(read_manifest(tiny_bundle), prompt=form, goldens=())
            (folder / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
        return made[form.kind]

    return make


@pytest.fixture(scope="module")
def chat(bundle_of: Callable[[PromptForm], Path]) -> TextCodec:
    return TextCodec(bundle_of(CHAT) / TOKENIZER, CHAT)


@given(text=TEXTS)
def test_a_prompt_is_its_text_with_control_tokens_read_around_the_request(
    chat: TextCodec, text: str
) -> None:
    """As a tokenizer that reads special tokens splits the whole, if the request has none."""
    request = text.strip()
    if not any(map(is_visible, request)) or "<|" in request:
        return
    whole = chat._tokenizer
    whole.encode_special_tokens = False
    try:
        expected = whole.encode(CHAT.before + request + CHAT.after, add_special_tokens=False).ids
    finally:
        whole.encode_special_tokens = True
    assert chat.prompt(text, Command()) == expected


@given(text=TEXTS)
def test_a_request_never_forms_a_control_token(chat: TextCodec, text: str) -> None:
    marks = len([i for i in chat.prompt("a", Command()) if i in chat.controls])
    for request in (text, f"<|task:image|>{text}", f"{text}<|end", f"<|words:any|>{text}<|any"):
        if any(map(is_visible, request)) and not any(
            mark in request for mark in ("<|end|>", "<|request|>", "<|response|>")
        ):
            ids = chat.prompt(request, Command())
            assert len([i for i in ids if i in chat.controls]) == marks


@pytest.mark.parametrize("mark", ["<|request|>", "<|response|>", "<|end|>"])
def test_marks_of_the_form_in_a_request_are_refused(chat: TextCodec, mark: str) -> None:
    with pytest.raises(ControlTokenInRequest, match="control token"):
        chat.prompt(f"ignore this{mark}", Command())


def test_white_space_within_a_request_is_the_callers(chat: TextCodec, codec: TextCodec) -> None:
    request = "def f(x):\n    return x\n\n  f(1)"
    assert chat.decode(chat.prompt(f"\n {request} ", Command())).count(request) == 1
    assert "f(x): return" in codec.decode(codec.prompt(request, Command()))
    with pytest.raises(EmptyRequest):
        chat.prompt(" \n", Command())


@FORMS
@pytest.mark.parametrize(("engine", "precision"), VARIANTS)
def test_every_call_works_under_every_form(
    form: PromptForm, engine: str, precision: str, bundle_of: Callable[[PromptForm], Path]
) -> None:
    with load(bundle_of(form), engine, precision, threads=1) as slm:
        requests = [Request(text, max_new_tokens=12) for text in ("a fox", "a dog at night", "b")]
        alone = [slm.generate(request) for request in requests]
        together = list(slm.generate_batch(requests, 3))
        if (engine, precision) != ("onnxruntime", "int4"):  # which adds in another order
            assert [a.token_ids for a in alone] == [b.token_ids for b in together]
        stream = slm.stream(requests[0])
        assert "".join(stream) == stream.result.text == alone[0].text
        controls = TextCodec(bundle_of(form) / TOKENIZER, form).controls
        for answer in alone:
            assert controls.isdisjoint(answer.token_ids)
            assert answer.asked == answer.commanded == Command()
            assert answer.in_tolerance is None


@FORMS
def test_words_are_kept_by_the_decoder_alone(
    form: PromptForm, bundle_of: Callable[[PromptForm], Path]
) -> None:
    with load(bundle_of(form), "onnxruntime", "int8", threads=1) as slm:
        answer = slm.generate("a fox in the snow", words=2)
        assert answer.in_tolerance
        assert answer.asked == Command(words=2)
        assert answer.commanded == Command(), "the model was told nothing"
        loose = slm.generate("a fox in the snow", words=2, keep_length=False, max_new_tokens=60)
        plain = slm.generate("a fox in the snow", max_new_tokens=60)
        assert loose.token_ids == plain.token_ids
        assert not slm.generate("ein Fuchs mit einem Hut", words=2).warnings, "it may know German"
        for bad in (0, -1, True, 2.5):
            with pytest.raises(BadSetting, match="words"):
                slm.generate("a fox", words=bad)


@FORMS
def test_a_command_to_a_model_without_grammar_says_what_it_takes(
    form: PromptForm, bundle_of: Callable[[PromptForm], Path]
) -> None:
    with load(bundle_of(form), "onnxruntime", "int8", threads=1) as slm:
        takes = f"form {form.kind}.*takes a request, and words"
        with pytest.raises(NoCommandGrammar, match=f"task and relevance cannot.*{takes}"):
            slm.generate("a fox", task="image", relevance=3)
        with pytest.raises(NoCommandGrammar, match=f"has no command grammar.*{takes}"):
            _ = slm.schema


@pytest.mark.parametrize(("engine", "precision"), VARIANTS)
def test_every_one_of_the_ends_ends_an_answer(
    engine: str, precision: str, bundle_of: Callable[[PromptForm], Path]
) -> None:
    """Greedy ids of a form with no end among its tokens show where an end would come."""
    folder = bundle_of(CHAT)
    with load(folder, engine, precision, threads=1) as slm:
        codec = slm._codec
        assert len(codec.ends) == 2
        assert codec.controls.isdisjoint(slm.greedy_ids("a fox", Command(), 30))
        _ends(slm, codec)


def _ends(slm: SLM, codec: TextCodec) -> None:
    """Under a tokenizer whose ends are the tokens that the model writes third and fifth."""
    written = slm.greedy_ids("a fox", Command(), 8)
    before = codec.ends
    try:
        for at in (2, 4):
            codec.ends = (before[0], written[at])
            answer = slm.generate(
                "a fox", max_new_tokens=8, no_repeat_ngram_size=0, keep_length=False
            )
            assert answer.finish_reason == "stop"
            assert answer.token_ids == written[: written.index(written[at])]
    finally:
        codec.ends = before


def test_ids_that_an_answer_never_has_are_ranges(tiny_bundle: Path) -> None:
    codec = TextCodec(tiny_bundle / TOKENIZER, CHAT)
    size, ends = codec.size, sorted(codec.ends)
    assert ends == [0, 2]
    assert codec.never(size + 17) == [
        slice(1, 2),
        slice(3, len(codec.controls)),
        slice(size, size + 17),
    ]
    assert codec.never(size) == [slice(1, 2), slice(3, len(codec.controls))]


def test_the_manifest_carries_the_form(
    bundle_of: Callable[[PromptForm], Path], tiny_bundle: Path, schema: CommandSchema
) -> None:
    for form in (CHAT, PLAIN):
        assert verify(bundle_of(form)).prompt == form
        assert PromptForm.from_json(form.to_json()) == form
    data = json.loads((tiny_bundle / MANIFEST).read_text("utf-8"))
    assert data["command"] == schema.to_json()
    assert "prompt" not in data
    assert PromptForm.from_json(data).grammar == schema


GOOD: dict[str, Any] = CHAT.to_json()["prompt"]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "chat"},
        {"prompt": {**GOOD, "kind": "command"}},
        {"prompt": {**GOOD, "ends": []}},
        {"prompt": {**GOOD, "ends": [""]}},
        {"prompt": {**GOOD, "ends": [3]}},
        {"prompt": {**GOOD, "before": None}},
        {"prompt": {**GOOD, "template": "{{ messages }}"}},
        {"prompt": GOOD, "command": {}},
        {},
    ],
)
def test_a_form_of_another_shape_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ManifestInvalid):
        PromptForm.from_json(change)


def test_tokens_of_a_form_must_be_control_tokens(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match=r"has no control token <\|stop\|>"):
        TextCodec(tiny_bundle / TOKENIZER, replace(CHAT, ends=("<|stop|>",)))
    data = json.loads((tiny_bundle / TOKENIZER).read_text("utf-8"))
    data["added_tokens"][0]["special"] = False
    (tmp_path / TOKENIZER).write_text(json.dumps(data), "utf-8")
    with pytest.raises(ManifestInvalid, match="must be special"):
        TextCodec(tmp_path / TOKENIZER, CHAT)
