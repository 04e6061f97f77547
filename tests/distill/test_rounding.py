"""Training with int4 weights: the converters' rounding, and float weights that learn."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from edge_slm.distill import rounding
from edge_slm.distill.model import fresh_model
from edge_slm.distill.recipe import ModelRecipe
from edge_slm_converters import blocks

SHAPES = {
    "gpt2": {"architecture": "gpt2", "width": 32, "heads": 2},
    "llama": {"architecture": "llama", "width": 32, "heads": 2, "kv_heads": 1},
}


def model_of(shape: str) -> Any:
    return fresh_model(ModelRecipe(layers=2, vocab_size=600, positions=32, **SHAPES[shape]), seed=1)


@pytest.mark.parametrize("inputs", [64, 100, 7])
def test_it_is_the_rounding_of_the_converters(inputs: int) -> None:
    weight = np.random.default_rng(0).normal(size=(inputs, 5)).astype(np.float32)
    weight[:, 0] = 0
    weight[:, 1] = np.abs(weight[:, 1])  # zero is an end of its range
    expected = blocks.nearest(weight, rounding.BLOCK, ranges=(np.float32(1),)).matrix()
    got = rounding.nearest(torch.from_numpy(weight.T.copy())).numpy().T
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_are_rounded_inside_and_themselves_afterwards(shape: str) -> None:
    lm = model_of(shape)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    matrices = {name for name, p in lm.named_parameters() if p.dim() == 2 and ".0." in name}
    with suppress(ZeroDivisionError), rounding.rounded(lm):
        changed = {n for n, t in lm.state_dict().items() if not torch.equal(t, before[n])}
        assert {name for name in changed if ".0." in name} == matrices
        assert not any("embed" in name or "wte" in name or "lm_head" in name for name in changed)
        for weight, inputs_first in rounding.matrices(lm):
            values = weight.data.T if inputs_first else weight.data
            assert max(len(row.unique()) for row in values[:, : rounding.BLOCK]) <= 16
        raise ZeroDivisionError
    assert all(torch.equal(t, before[n]) for n, t in lm.state_dict().items())


def test_learning_shrinks_the_loss_of_the_rounded_model() -> None:
    lm = model_of("llama")
    ids = torch.arange(24)[None] % 7
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)

    def loss() -> torch.Tensor:
        return lm(input_ids=ids, labels=ids).loss

    with rounding.rounded(lm):
        first = loss().item()
    for _ in range(20):
        with rounding.rounded(lm):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    with rounding.rounded(lm):
        assert loss().item() < first / 2
