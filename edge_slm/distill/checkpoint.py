"""Writes a checkpoint in the Hugging Face layout, with the command schema beside it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from edge_slm.distill.prepare import Prepared
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.tokenizer import save_tokenizer


def save_checkpoint(
    model: Any, prepared: Prepared, recipe: Recipe, target: Path, metrics: dict[str, Any]
) -> Path:
    """fp16 safetensors, config, tokenizer, command.json, recipe.json; aside, then renamed."""
    import torch

    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.to(torch.float16).save_pretrained(aside, safe_serialization=True)
        save_tokenizer(prepared.tokenizer, aside)
        _write_json(aside / "command.json", prepared.schema.to_json())
        _write_json(
            aside / "recipe.json",
            {
                "digest": recipe.digest(),
                "recipe": recipe.as_dict(),
                "data": prepared.facts,
                "metrics": metrics,
            },
        )
        for file in aside.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        aside.chmod(0o755)
        aside.replace(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")
