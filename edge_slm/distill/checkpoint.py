"""Writes a checkpoint in the Hugging Face layout, with the command schema beside it."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from edge_slm.distill.files import write_json
from edge_slm.distill.tokenizer import save_tokenizer
from edge_slm_runtime.command import CommandSchema


def save_checkpoint(
    model: Any, tokenizer: Any, schema: CommandSchema, facts: dict[str, Any], target: Path
) -> Path:
    """fp16 safetensors, config, tokenizer, command.json, recipe.json (`facts`); aside, renamed.

    The model itself keeps its precision.
    """
    import torch

    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        half = copy.deepcopy(model).to(torch.float16)
        half.save_pretrained(aside, safe_serialization=True)
        save_tokenizer(tokenizer, aside)
        write_json(schema.to_json(), aside / "command.json")
        write_json(facts, aside / "recipe.json")
        for file in aside.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        aside.chmod(0o755)
        aside.replace(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target
