"""Writes checkpoints in the Hugging Face layout, and the states of a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from edge_slm.distill.tokenizer import save_tokenizer
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.files import write_aside, write_folder_aside, write_json


def save_checkpoint(
    model: Any, tokenizer: Any, schema: CommandSchema, facts: dict[str, Any], target: Path
) -> Path:
    """Writes the folder `target`: fp16 weights, tokenizer, command.json, recipe.json (`facts`).

    `model` itself keeps its precision. Raises TargetExists.
    """
    import torch

    half = copy.deepcopy(model).to(torch.float16)
    with write_folder_aside(target) as folder:
        half.save_pretrained(folder, safe_serialization=True)
        save_tokenizer(tokenizer, folder)
        write_json(schema.to_json(), folder / "command.json")
        write_json(facts, folder / "recipe.json")
    return target


def save_state(state: dict[str, Any], target: Path) -> None:
    """A torch file in the place of what `target` held before, complete after a crash."""
    import torch

    with write_aside(target) as aside:
        torch.save(state, aside)
