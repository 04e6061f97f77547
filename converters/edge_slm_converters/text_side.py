"""The text side of a checkpoint: its tokenizer, and the form of its prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_slm_converters.gguf_tokenizer import tokenizer_json
from edge_slm_converters.json_files import read_json
from edge_slm_converters.prompts import prompt_form
from edge_slm_runtime.bundle import WORDS
from edge_slm_runtime.command import END, REQUEST, CommandSchema
from edge_slm_runtime.errors import CheckpointError, ManifestInvalid
from edge_slm_runtime.lexicon import read_lexicon
from edge_slm_runtime.prompt import PromptForm
from edge_slm_runtime.text import TextCodec, open_tokenizer

TOKENIZER, SCHEMA = "tokenizer.json", "command.json"
# Beside these: the files that say how a model trained elsewhere is prompted, and how its texts end.
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# Contents of SETTINGS for a tokenizer of ours, so that transformers' AutoTokenizer reads it.
OWN_SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END}
ENDS_FROM = ("generation_config.json", "config.json")


@dataclass(frozen=True, slots=True)
class TextSide:
    """tokenizer: the contents of tokenizer.json. tokens: in id order. files: names of the
    files that were read, where there is a folder. lexicon: the contents of words.txt, empty
    where there is none."""

    codec: TextCodec
    tokenizer: bytes
    tokens: tuple[str, ...]
    files: tuple[str, ...] = ()
    lexicon: bytes = b""


def of_folder(path: Path, prompt: str | None = None) -> TextSide:
    """Of a checkpoint folder; with command.json, its prompts are commands.

    prompt: a form of `prompts.NAMES` for a model without command.json, instead of the one
    that is recognised. Raises CheckpointError.
    """
    file = path / TOKENIZER
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    content, files = file.read_bytes(), [TOKENIZER]
    try:
        if (path / SCHEMA).is_file():
            form, more = PromptForm.commanded(read_schema(path)), [SCHEMA]
        else:
            form, more = _form_of_folder(path, content, prompt)
        side = _text_side(content, form, (*files, *more))
    except ManifestInvalid as error:
        raise CheckpointError(f"{path}: {error.problem}") from None
    if not (path / WORDS).is_file():
        return side
    lexicon = (path / WORDS).read_bytes()
    try:
        read_lexicon(lexicon)
    except ValueError as error:
        raise CheckpointError(f"{path / WORDS} is no lexicon: {error}") from None
    return replace(side, files=(*side.files, WORDS), lexicon=lexicon)


def of_gguf(metadata: Mapping[str, Any], prompt: str | None = None) -> TextSide:
    """Of the metadata of a GGUF file. prompt: as of `of_folder`. Raises CheckpointError."""
    data = tokenizer_json(metadata)
    tokens = list(data["model"]["vocab"])
    controls = {token["content"] for token in data["added_tokens"] if token["special"]}

    def named(*kinds: str) -> list[str]:
        ids = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in kinds)
        return [tokens[i] for i in ids if isinstance(i, int) and 0 <= i < len(tokens)]

    start = named("bos") if metadata.get("tokenizer.ggml.add_bos_token") else []
    template = metadata.get("tokenizer.chat_template")
    form = prompt_form(template, named("eos", "eot"), controls, "".join(start), prompt)
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    try:
        return _text_side(content, form)
    except ManifestInvalid as error:
        raise CheckpointError(f"GGUF: {error.problem}") from None


def read_schema(path: Path) -> CommandSchema:
    """The command schema of the checkpoint folder `path`. Raises CheckpointError."""
    try:
        return CommandSchema.from_json(read_json(path / SCHEMA))
    except ManifestInvalid as error:
        raise CheckpointError(f"{path / SCHEMA}: {error.problem}") from None


def _form_of_folder(path: Path, content: bytes, prompt: str | None) -> tuple[PromptForm, list[str]]:
    """The form of a model that was trained elsewhere, and the files that it was read from."""
    there = [name for name in (SETTINGS, *ENDS_FROM) if (path / name).is_file()]
    read = {name: read_json(path / name) for name in there}
    tokenizer = open_tokenizer(content)
    added = tokenizer.get_added_tokens_decoder()
    controls = {i: token.content for i, token in added.items() if token.special}
    if prompt is None and REQUEST in controls.values():  # trained here, on commands
        raise CheckpointError(f"{path / SCHEMA} is missing")
    settings = read.get(SETTINGS, {})
    ends = [_content(settings.get("eos_token"))]
    for name in ENDS_FROM:
        ids = read.get(name, {}).get("eos_token_id")
        ends += [controls.get(i, "") for i in (ids if isinstance(ids, list) else [ids])]
    template = settings.get("chat_template")
    if (path / TEMPLATE).is_file():
        template = (path / TEMPLATE).read_text("utf-8")
        there.append(TEMPLATE)
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    form = prompt_form(template, ends, set(controls.values()), _start(tokenizer), prompt)
    return form, there


def _start(tokenizer: Any) -> str:
    """The tokens that a tokenizer puts before every text."""
    ids, bare = (tokenizer.encode("a", add_special_tokens=which).ids for which in (True, False))
    before = ids[: len(ids) - len(bare)] if ids[-len(bare) :] == bare else []
    return "".join(tokenizer.id_to_token(i) for i in before)


def _content(token: Any) -> str:
    """A token of tokenizer_config.json: a text, or an object with its properties."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""


def _text_side(tokenizer: bytes, form: PromptForm, files: Sequence[str] = ()) -> TextSide:
    codec = TextCodec(tokenizer, form)
    ids = open_tokenizer(tokenizer).get_vocab()
    return TextSide(codec, tokenizer, tuple(sorted(ids, key=ids.__getitem__)), tuple(files))
