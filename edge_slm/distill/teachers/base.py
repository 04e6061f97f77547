"""What a teacher is: it invents requests and answers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_slm.progress import Progress

BATCH = 16  # asks that a teacher may answer together, counted from the first one


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to answer. words: the target length; None: the teacher varies it."""

    task: str
    request: str
    words: int | None = None
    seed: int = 0


class Teacher(Protocol):
    """Deterministic by seed where its engine is."""

    name: str  # the "source" of its samples

    def invent(self, task: str, count: int, seed: int) -> list[str]:
        """Up to `count` distinct requests that a user might make."""
        ...

    def answer(
        self, asks: Sequence[Ask], candidates: int, progress: Progress | None = None
    ) -> Iterator[tuple[Ask, list[str]]]:
        """Every ask, in order, with up to `candidates` distinct texts."""
        ...
