"""Writes checkpoints in the Hugging Face layout, and the states of a run."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

from edge_slm.distill.tokenizer import save_tokenizer
from edge_slm_converters.sums import write_sums
from edge_slm_runtime.bundle import WORDS, file_entry
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.errors import DataError
from edge_slm_runtime.files import write_aside, write_folder_aside, write_json


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    schema: CommandSchema,
    facts: dict[str, Any],
    target: Path,
    lexicon: bytes = b"",
) -> Path:
    """Writes the folder `target`: fp16 weights, tokenizer, command.json, recipe.json (`facts`),
    where there is a `lexicon` words.txt, and the sums of them all.

    `model` itself keeps its precision. Raises TargetExists.
    """
    import torch

    half = copy.deepcopy(model).to(torch.float16)
    with write_folder_aside(target) as folder:
        half.save_pretrained(folder, safe_serialization=True)
        save_tokenizer(tokenizer, folder)
        write_json(schema.to_json(), folder / "command.json")
        write_json(facts, folder / "recipe.json")
        if lexicon:
            (folder / WORDS).write_bytes(lexicon)
        write_sums(folder)
    return target


def save_state(state: dict[str, Any], target: Path) -> None:
    """A torch file in the place of what `target` held before, complete after a crash, with
    its sha256 at the end, which torch ignores."""
    import torch

    with write_aside(target) as aside:
        torch.save(state, aside)
        digest = bytes.fromhex(file_entry(aside).sha256)
        with aside.open("ab") as file:
            file.write(digest)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote. Raises DataError when it was damaged."""
    import torch

    digest, end = hashlib.sha256(), path.stat().st_size - hashlib.sha256().digest_size
    with path.open("rb") as file:
        while (left := end - file.tell()) > 0:
            digest.update(file.read(min(left, 1 << 20)))
        if end <= 0 or file.read() != digest.digest():
            raise DataError(f"{path} is damaged", "remove it; training begins its stage again")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
