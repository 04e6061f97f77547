"""Hugging Face models of any GPT-2 shape, saved as transformers saves them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_slm_converters.arrays import Float32

IDS = np.random.default_rng(3).integers(0, 300, 60).tolist()


@dataclass
class Original:
    """A saved checkpoint and the logits that transformers gives for `IDS` [S,V]."""

    path: Path
    logits: Float32


def logits_of(path: Path, ids: list[int]) -> Float32:
    """transformers' float32 logits [S,V] of a saved checkpoint."""
    import torch
    from transformers import GPT2LMHeadModel

    # transformers' sdpa attention ignores the scale settings; eager keeps to them.
    model = GPT2LMHeadModel.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        result: Float32 = model(torch.tensor([ids])).logits[0].numpy()
    return result


@pytest.fixture(scope="session")
def original(
    tiny_text_side: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Original]:
    """Makes a random GPT2LMHeadModel with the given settings and saves it."""

    def make(dtype: str = "float32", shard: str = "1GB", **settings: Any) -> Original:
        with warnings.catch_warnings():  # swig and jit warnings of torch's own imports
            warnings.simplefilter("ignore")
            import torch
            from transformers import GPT2Config, GPT2LMHeadModel
        torch.manual_seed(5)
        small = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 417, "n_positions": 96}
        config = GPT2Config(
            **{**small, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, **settings}
        )
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():  # biases and norms are 0 and 1 otherwise
            if parameter.dim() == 1:
                parameter.data += torch.randn_like(parameter) * 0.1
        path = tmp_path_factory.mktemp("original")
        model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)
        for name in ("tokenizer.json", "command.json"):
            shutil.copyfile(tiny_text_side / name, path / name)
        return Original(path, logits_of(path, IDS))

    return make
