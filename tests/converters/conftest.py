"""Hugging Face models of any shape, saved as transformers saves them."""

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

SMALL_GPT2 = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 96}
SMALL_LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 96,
}


@dataclass
class Original:
    """A saved checkpoint and the logits that transformers gives for `IDS` [S,V]."""

    path: Path
    logits: Float32


def logits_of(path: Path, ids: list[int]) -> Float32:
    """transformers' float32 logits [S,V] of a saved checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    # transformers' sdpa attention ignores the scale settings; eager keeps to them.
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        result: Float32 = model(torch.tensor([ids])).logits[0].numpy()
    return result


@pytest.fixture(scope="session")
def original(
    tiny_text_side: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Original]:
    """Makes a random model with the given settings and saves it."""

    def make(
        model_type: str = "gpt2", dtype: str = "float32", shard: str = "1GB", **settings: Any
    ) -> Original:
        with warnings.catch_warnings():  # swig and jit warnings of torch's own imports
            warnings.simplefilter("ignore")
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM
        torch.manual_seed(5)
        usual = {"vocab_size": 417, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
        small = SMALL_GPT2 if model_type == "gpt2" else SMALL_LLAMA
        config = AutoConfig.for_model(model_type, **{**usual, **small, **settings})
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases and norms are 0 and 1 otherwise
            if parameter.dim() == 1:
                parameter.data += torch.randn_like(parameter) * 0.1
        path = tmp_path_factory.mktemp("original")
        model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)
        for name in ("tokenizer.json", "command.json"):
            shutil.copyfile(tiny_text_side / name, path / name)
        return Original(path, logits_of(path, IDS))

    return make
