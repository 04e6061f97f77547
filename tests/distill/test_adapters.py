"""Adapters of tasks: trained on a frozen model, exported as what the converters merge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_slm.distill.adapters import Adapted
from edge_slm.distill.loop import distill
from edge_slm.distill.recipe import AdaptersRecipe, Recipe
from edge_slm_bench.metrics.examples import Scored
from edge_slm_converters import random_checkpoint, read_checkpoint
from edge_slm_converters.calibration import ForwardPass
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.deltas import merged, read_adapter

IDS = tuple(range(3, 43))


def logits(source: Checkpoint) -> np.ndarray:
    forward = ForwardPass(source.decoder, source.tensors, [Scored(IDS, 1)])
    x = forward.embedded()
    for i in range(source.decoder.layers):
        x = forward.layer(i, x)
    return np.asarray(forward.logits(x, source.head))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("targets", [("qkv",), ("out", "down"), ("qkv", "out", "up", "down")])
def test_what_is_exported_is_what_was_trained(
    tiny_checkpoint: Path, tmp_path: Path, architecture: str, targets: tuple[str, ...]
) -> None:
    more = {"kv_heads": 2, "inner": 96} if architecture == "llama" else {}
    random_checkpoint(
        tmp_path / "m",
        layers=2,
        width=64,
        heads=4,
        vocab_size=417,
        positions=64,
        like=tiny_checkpoint,
        architecture=architecture,
        std=0.2,
        **more,  # type: ignore[arg-type]
    )
    model = Adapted(
        tmp_path / "m", AdaptersRecipe.model_validate({"rank": 3, "targets": targets}), 1
    )
    trained = [p for p in model.lm.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(model.layers)
    torch.manual_seed(2)
    for layer in model.layers.values():
        torch.nn.init.normal_(layer.b, std=0.05)
    with torch.no_grad():
        expected = model.lm.eval()(torch.tensor([IDS])).logits[0, :-1].numpy()
    source = read_checkpoint(tmp_path / "m")
    delta = model.delta("image")
    assert {name.split(".")[2] for name in delta.factors} == set(targets)
    found = logits(merged(source, [delta]))
    assert np.abs(found - logits(source)).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=5e-3)  # of factors in half precision


@pytest.fixture(scope="module")
def with_adapters(recipe: Recipe) -> Recipe:
    adapters = {"tokens": 96 * 4 * 8, "rank": 4, "learning_rate": 1e-2}
    return Recipe.model_validate(
        {**recipe.as_dict(), "explore": {"rounds": 0}, "adapters": adapters}
    )


@pytest.mark.slow
def test_a_run_with_adapters(
    with_adapters: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    checkpoint = distill(with_adapters, [data_file], tmp_path / "a", cache=cache)
    source = read_checkpoint(checkpoint)
    deltas = [read_adapter(file, source) for file in sorted(checkpoint.glob("deltas/*"))]
    assert [(delta.name, delta.task) for delta in deltas] == [("image",) * 2, ("tags",) * 2]
    assert not (tmp_path / "a/base").exists()
    without = with_adapters.model_copy(update={"adapters": AdaptersRecipe()})
    plain = distill(without, [data_file], tmp_path / "b", cache=cache)
    assert (plain / "model.safetensors").read_bytes() == (
        checkpoint / "model.safetensors"
    ).read_bytes()
    last = json.loads((tmp_path / "b/metrics-stage-1.jsonl").read_text("utf-8").splitlines()[-1])
    for task in ("image", "tags"):
        lines = (tmp_path / f"a/metrics-adapter-{task}.jsonl").read_text("utf-8").splitlines()
        losses = [json.loads(line)["cross_entropy"] for line in lines]
        assert losses[-1] < losses[0]
        assert len(lines) == last["step"]


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_adapters(
    with_adapters: Recipe, data_file: Path, cache: Path, tmp_path: Path
) -> None:
    whole = distill(with_adapters, [data_file], tmp_path / "whole", cache=cache)
    parts = tmp_path / "parts"
    for _ in range(4):
        stopped = distill(with_adapters, [data_file], parts, cache=cache, max_steps=7)
    assert stopped == parts / "checkpoint"
    for file in (*whole.glob("deltas/*"), whole / "model.safetensors"):
        assert (stopped / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_the_recipe(recipe: Recipe) -> None:
    assert "adapters" not in recipe.as_dict()  # digests of older recipes stay
    with pytest.raises(ValueError, match="targets must name a matrix"):
        Recipe.model_validate({**recipe.as_dict(), "adapters": {"targets": []}})
    with pytest.raises(ValueError, match=r"at least train\.batch_tokens"):
        Recipe.model_validate({**recipe.as_dict(), "adapters": {"tokens": 1}})
