"""Descriptions of the tasks, for teachers and judges.

They are data: edge_slm/data/teacher/tasks/<task>.toml says what the task is, its usual
lengths in words, examples and ideas; default.toml serves any other task.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from importlib.abc import Traversable  # where Python 3.10 has it


@dataclass(frozen=True, slots=True)
class TaskBrief:
    """what: one paragraph. words: the usual (least, most). examples: (request, response)."""

    what: str
    words: tuple[int, int]
    examples: tuple[tuple[str, str], ...]
    ideas: tuple[str, ...]


@lru_cache
def task_brief(task: str) -> TaskBrief:
    """The description of a task; that of default.toml for a task without a file."""
    folder = files("edge_slm") / "data" / "teacher" / "tasks"
    file = folder / f"{task}.toml"
    data = _read(file if file.is_file() else folder / "default.toml")
    return TaskBrief(
        " ".join(data["what"].split()).replace("{task}", task),
        (data["words"][0], data["words"][1]),
        tuple((example["request"], example["response"]) for example in data["examples"]),
        tuple(data["ideas"]),
    )


@lru_cache
def themes() -> tuple[str, ...]:
    """Subjects that make the invented requests of an LLM differ."""
    return tuple(_read(files("edge_slm") / "data" / "teacher" / "themes.toml")["themes"])


def _read(file: Traversable) -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    return data
