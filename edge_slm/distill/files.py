"""Files that are whole or not there: written aside, flushed to disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_torch(state: Any, path: Path) -> None:
    import torch

    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_text(text: str, path: Path) -> None:
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(data: Any, path: Path) -> None:
    write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", path)


def write_jsonl(rows: Iterable[Any], path: Path) -> None:
    write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)
