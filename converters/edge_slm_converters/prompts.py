"""The prompt form of a model that was trained elsewhere.

Chat templates are programs; they are recognised by the text that they write, never run. A known
template becomes literal text (`PromptForm`); any other is refused, and may be given a form by
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from edge_slm_runtime.errors import CheckpointError, shown
from edge_slm_runtime.prompt import PromptForm

# Tokens that end a turn or a text wherever they are control tokens.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")
PLAIN = "plain"


def _no_system(template: str) -> str:
    return ""


def _chatml_system(template: str) -> str:
    """The turn of a default system message, where the template has one."""
    turn = re.search(r"<\|im_start\|>system\n[^'\"{}<]+<\|im_end\|>\n", template)
    return turn[0] if turn else ""


def _llama3_system(template: str) -> str:
    """Llama 3.1 and later always begin with dates; ours is the one written in the template."""
    today = re.search(r"date_string = \"([^\"]+)\"", template)
    if not today or "Cutting Knowledge Date" not in template:
        return ""
    return (
        "<|start_header_id|>system<|end_header_id|>\n\n"
        f"Cutting Knowledge Date: December 2023\nToday Date: {today[1]}\n\n<|eot_id|>"
    )


@dataclass(frozen=True, slots=True)
class Chat:
    """A kind of chat template.

    marks: text that every template of the kind contains. start: the beginning of a
    conversation. system: the default system turn of a template. before, after: of the request; END
    in them is the token that ends a text. end: the token that ends an answer, by default END.
    """

    marks: tuple[str, ...]
    before: str
    after: str
    start: str = ""
    end: str = ""
    system: Callable[[str], str] = _no_system


CHATS: Mapping[str, Chat] = {
    "chatml": Chat(
        marks=("<|im_start|>", "<|im_end|>", "assistant\n"),
        system=_chatml_system,
        before="<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
    ),
    "llama3": Chat(
        marks=("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
        start="<|begin_of_text|>",
        system=_llama3_system,
        before="<|start_header_id|>user<|end_header_id|>\n\n",
        after="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
    ),
    "zephyr": Chat(
        marks=("<|user|>\n", "<|assistant|>", "eos_token"),
        before="<|user|>\n",
        after="END\n<|assistant|>\n",
    ),
}
NAMES = (*CHATS, PLAIN)


def prompt_form(
    template: object,
    ends: Sequence[str],
    controls: Collection[str],
    start: str = "",
    name: str | None = None,
) -> PromptForm:
    """The form of a model with this chat template; without one, plain text to continue.

    ends: the tokens that end a text by the model's files. controls: all control tokens. start: the
    beginning of a plain text. name: one of NAMES instead of the form recognised.

    Raises CheckpointError for a template that is not known, or when nothing ends a text.
    """
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"the chat template is {shown(template)}, not a text")
    text = (template or "").replace("\\n", "\n")
    if name is None:
        name = _recognised(text) if template else PLAIN
    if name not in NAMES:
        raise CheckpointError(f"unknown prompt form {name!r}", f"known: {', '.join(NAMES)}")
    chat = CHATS.get(name)
    first = [chat.end] if chat and chat.end else []
    if missing := set(first) - set(controls):
        raise CheckpointError(f"the tokenizer has no control token {missing.pop()}")
    ending = [end for end in dict.fromkeys((*first, *ends, *ENDS)) if end in controls]
    if not ending:
        raise CheckpointError("the tokenizer has no control token that ends a text")
    if not chat:
        return PromptForm("plain", tuple(ending), start)
    before = chat.start + chat.system(text) + chat.before
    return PromptForm("chat", tuple(ending), before, chat.after.replace("END", ending[0]))


def _recognised(template: str) -> str:
    for name, chat in CHATS.items():
        if all(mark in template for mark in chat.marks):
            return name
    raise CheckpointError(
        "the chat template is not known, and templates are never run",
        f"known: {', '.join(CHATS)}; or choose a prompt form by name",
    )
