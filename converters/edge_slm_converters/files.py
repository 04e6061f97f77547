"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_slm_runtime.errors import TargetExists


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yields an empty folder next to `target`; on success it is flushed to disk and
    renamed to `target`, on any error it is removed.

    Raises TargetExists when `target` exists.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        refuse_existing(target)  # rename would replace an empty folder
        folder.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise TargetExists(f"{target} exists already", "remove it or choose another name")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
