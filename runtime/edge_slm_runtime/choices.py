"""Answers that are one of several given texts, chosen token by token as the model likes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Choices:
    """The texts of one answer as paths of tokens, with and without a space in front of them:
    which of these a model begins its answers with is its own matter."""

    def __init__(self, texts: Sequence[str], encode: Callable[[str], list[int]]) -> None:
        """encode: token ids of a text."""
        self.paths = {(*encode(lead + text),) for text in texts for lead in ("", " ")}

    def next(self, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
        """The tokens that may follow `ids`, the first ones of an answer: `ends` where they are
        a text."""
        begun = (*ids,)
        going_on = {p[len(begun)] for p in self.paths if p[: len(begun)] == begun != p}
        return [*going_on, *(ends if begun in self.paths else ())]
