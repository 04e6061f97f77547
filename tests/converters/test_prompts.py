"""Chat templates recognised by their text: the literal prompt is what the template writes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edge_slm_converters.prompts import prompt_form
from edge_slm_runtime.errors import CheckpointError

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
CONTROLS = {
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
# template, the token that begins a text, the tokens that end it
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (  # the parts that a single request reaches
    "{{- bos_token }}\n{%- if not date_string is defined %}\n"
    '    {%- set date_string = "26 Jul 2024" %}'
    '\n{%- endif %}\n{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}\n'
    '{{- "Cutting Knowledge Date: December 2023\n" }}\n'
    '{{- "Today Date: " + date_string + "\n\n" }}\n{{- "<|eot_id|>" }}\n'
    "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
KNOWN: dict[str, tuple[str, str, str]] = {
    "SmolLM2": (SMOLLM2, "<|im_start|>", "<|im_end|>"),
    "Qwen2": (QWEN2, "", "<|im_end|>"),
    "ChatML": (CHATML, "", "<|im_end|>"),
    "Llama 3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "Llama 3.1": (LLAMA31, "<|begin_of_text|>", "<|eot_id|>"),
    "Zephyr": (ZEPHYR, "<s>", "</s>"),
}


@pytest.mark.parametrize("escaped", [False, True], ids=["line breaks", "escaped"])
@pytest.mark.parametrize("name", KNOWN)
def test_the_literal_prompt_is_what_the_template_writes(name: str, escaped: bool) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    template, start, end = KNOWN[name]
    if escaped:  # within quotes, where both spellings mean the same
        template = re.sub(_QUOTED, lambda text: text[0].replace("\n", "\\n"), template)
    settings: dict[str, Any] = {"bos_token": start, "eos_token": end}
    turns = [[{"role": "user", "content": "Hello there"}]]
    ((expected,), _) = render_jinja_template(
        turns, chat_template=template, add_generation_prompt=True, **settings
    )
    form = prompt_form(template, [end], CONTROLS)
    assert form.kind == "chat"
    assert form.before + "Hello there" + form.after == expected
    assert form.ends[0] == end
    assert "<|endoftext|>" in form.ends


def test_without_a_template_text_is_continued() -> None:
    form = prompt_form(None, ["<|endoftext|>"], CONTROLS, start="<s>")
    assert (form.kind, form.before, form.after) == ("plain", "<s>", "")
    assert form.ends[0] == "<|endoftext|>"


def test_a_form_may_be_chosen_by_name() -> None:
    unknown = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    with pytest.raises(CheckpointError, match=r"not known.*never run.*chatml.*by name"):
        prompt_form(unknown, ["</s>"], CONTROLS)
    assert prompt_form(unknown, ["</s>"], CONTROLS, name="plain").kind == "plain"
    form = prompt_form(unknown, ["</s>"], CONTROLS, name="zephyr")
    assert form.after == "</s>\n<|assistant|>\n"
    with pytest.raises(CheckpointError, match=r"unknown prompt form 'alpaca'.*chatml"):
        prompt_form(None, ["</s>"], CONTROLS, name="alpaca")


def test_what_ends_a_text_must_be_a_control_token() -> None:
    with pytest.raises(CheckpointError, match="no control token that ends a text"):
        prompt_form(None, ["."], {"<pad>"})
    with pytest.raises(CheckpointError, match=r"no control token <\|im_end\|>"):
        prompt_form(CHATML, ["</s>"], {"</s>"})
