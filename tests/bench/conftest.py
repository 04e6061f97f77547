"""Made trees of /proc and /sys: the machines that the tests do not run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Plant = Callable[[Mapping[str, object]], Path]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Writes files, path → content, under one root, and returns the root."""

    def write(files: Mapping[str, object]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n", encoding="utf-8")
        return tmp_path

    return write
