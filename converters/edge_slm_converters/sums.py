"""The sha256 sums of a checkpoint folder, as `sha256sum` writes and checks them.

Checkpoints that we write have them, since a flipped bit in a weight is a number like any other.
"""

from __future__ import annotations

import re
from pathlib import Path

from edge_slm_runtime.bundle import file_entry
from edge_slm_runtime.errors import CheckpointError

SUMS = "checkpoint.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\0]+)")


def write_sums(folder: Path) -> None:
    """Writes those of all files that `folder` has."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    lines = [f"{file_entry(file).sha256}  {file.name}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), "utf-8")


def check_sums(folder: Path) -> None:
    """Raises CheckpointError when a file differs from its sum or is missing. A folder without
    sums, of another program, is taken as it is."""
    if not (folder / SUMS).is_file():
        return
    try:
        lines = (folder / SUMS).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / SUMS} cannot be read: {error}") from None
    for line in lines:
        if not (entry := _LINE.fullmatch(line)):
            raise CheckpointError(f"{folder / SUMS} is damaged", "get the checkpoint again")
        digest, name = entry.groups()
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing", "get the checkpoint again")
        if file_entry(folder / name).sha256 != digest:
            raise CheckpointError(
                f"{folder / name} is not what was written: its sha256 differs from {SUMS}",
                f"get the checkpoint again; if you changed it yourself, remove {SUMS}",
            )
