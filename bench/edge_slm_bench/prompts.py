"""Prompts of a wanted length in tokens, the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, cycle, islice
from pathlib import Path

from edge_slm_bench.runners.base import Prompt
from edge_slm_bench.runners.edge_slm import long_words
from edge_slm_runtime.bundle import TOKENIZER, read_manifest
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import BadSetting, RequestTooLong
from edge_slm_runtime.text import TextCodec

_WORDS = ("a", "cosy", "cabin", "in", "the", "snow", "at", "night")


def prompts_of(bundle: str | Path, tokens: int, count: int, *, other: bool = False) -> list[Prompt]:
    """`count` prompts of exactly `tokens` tokens, command included. other: the same requests
    under another command, which asks for nearly as many words.

    Raises BadSetting when a command alone is longer, or no text has that length.
    """
    manifest = read_manifest(bundle)
    codec = TextCodec(Path(bundle) / TOKENIZER, manifest.prompt)
    words = long_words(manifest.prompt)[other]
    command = manifest.prompt.check(Command(None, words)).commanded

    def encoded(text: str) -> tuple[int, ...]:
        return tuple(codec.prompt(text, command))

    prompts = []
    for turn in range(count):
        try:
            text = request_of(tokens, lambda text: len(encoded(text)), turn)
            ids = encoded(text)
        except RequestTooLong:
            ids = ()
        if len(ids) != tokens:
            raise BadSetting(
                f"no prompt of {tokens} tokens can be made for {manifest.name}",
                f"an empty one has {len(encoded('a'))} with its command",
            )
        prompts.append(Prompt(text, words, ids))
    return prompts


def request_of(tokens: int, count: Callable[[str], int], turn: int = 0) -> str:
    """A request that `count` (text → prompt tokens) puts at `tokens`, or as close below.

    Plain words, another first one for each `turn`; letters fill up what no word fits into.
    """
    words: Sequence[str] = tuple(islice(cycle(_WORDS), turn, turn + len(_WORDS)))
    text = words[0] if turn % len(_WORDS) else "a"
    for word in chain(*([words] * tokens)):
        if count(f"{text} {word}") > tokens:
            break
        text = f"{text} {word}"
    for filler in chain(*([(" a", "x", "q", " of")] * tokens)):
        if count(text) >= tokens:
            break
        if count(text + filler) <= tokens:
            text += filler
    return text
