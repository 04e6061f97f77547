"""Damaged checkpoints and GGUF files: read, or refused by an error of ours."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import VALUES, bytes_damaged, fuzz, json_bytes, json_damaged, tried
from isolation import outcome, read_checkpoint

from edge_slm_converters import read_checkpoint as read
from edge_slm_converters.gguf_writer import write_gguf

pytestmark = pytest.mark.slow

TENSORS: tuple[Any, ...] = (
    *("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", [0, 8], [8, 0], [2**63, 2**64]),
    *([0, 10**9], [-1, 5], [2**32, 2**32], [1.5], [0], [0, 1, 2], *VALUES),
)


@fuzz("checkpoint", 80)
def test_any_checkpoint(tmp_path: Path, tiny_checkpoint: Path, seed: str) -> str:
    choice = random.Random(seed)
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint", dirs_exist_ok=True))
    names = ["config.json", "model.safetensors", "tokenizer.json", "command.json"]
    file = folder / choice.choice([*names, *names[:2], "model.safetensors.index.json"])
    content = file.read_bytes() if file.exists() else b'{"weight_map": {"wte.weight": "x"}}'
    if choice.random() < 0.25:
        content = bytes_damaged(choice, content)
    elif file.suffix == ".json":
        content = json_bytes(choice, json_damaged(choice, json.loads(content)))
    else:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json_bytes(choice, json_damaged(choice, json.loads(content[8:end]), TENSORS))
        length = choice.choice([len(header)] * 10 + [0, 1, 2**31, 2**64 - 1])
        content = length.to_bytes(8, "little") + header + content[end:]
    file.write_bytes(tried(file.name, content))
    if file.name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "x")
    try:
        return outcome(read_checkpoint, folder)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def gguf_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(read(tiny_checkpoint), file, "F16")
    return file


@fuzz("gguf", 80)
def test_any_gguf_file(tmp_path: Path, gguf_file: Path, seed: str) -> str:
    """Most of the damage to the header, which ends where the first matrix begins."""
    choice, file, gguf = random.Random(seed), tmp_path / "tiny.gguf", gguf_file.read_bytes()
    end = choice.choice([64, 1024, gguf.index(b"token_embd.weight") + 1024])
    if choice.random() < 0.8:
        content = bytes_damaged(choice, gguf[:end]) + gguf[end:]
    else:
        content = bytes_damaged(choice, gguf)
    file.write_bytes(tried(file.name, content))
    return outcome(read_checkpoint, file)
