"""How long work reports its progress: the one pair of callables for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, total); total 0: unknown
StageProgress = Callable[[str, int, int, str], None]  # (stage, done, total, remark)


def silent(stage: str, done: int, total: int, remark: str = "") -> None:
    """A StageProgress that reports nothing."""
