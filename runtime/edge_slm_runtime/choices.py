"""Answers that are one of several given texts, or begin with one, chosen token by token as the
model likes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Choices:
    """The texts of one answer as paths of tokens."""

    def __init__(
        self,
        texts: Sequence[str],
        encode: Callable[[str], list[int]],
        leads: Sequence[str] = ("", " "),
    ) -> None:
        """encode: token ids of a text. leads: what may stand in front of it; with and without a
        space, because models differ in how they begin an answer."""
        self.paths = {(*encode(lead + text),) for text in texts for lead in leads}

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return max(map(len, self.paths))

    def next(self, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
        """The tokens that may follow `ids`, the first ones of an answer: `ends` where they are
        a text. None where they are neither a text nor the beginning of one."""
        begun = (*ids,)
        going_on = {p[len(begun)] for p in self.paths if p[: len(begun)] == begun != p}
        return [*going_on, *(ends if begun in self.paths else ())]
