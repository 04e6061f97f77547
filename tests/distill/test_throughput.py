from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_slm.distill.model import fresh_model
from edge_slm.distill.packing import Packer
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.throughput import flops_per_step, made_up_records, main
from edge_slm_runtime.command import CommandSchema, default_axes

RECIPE = """
[data]
tasks = ["image", "tags"]
[model]
vocab_size = 512
layers = 2
width = 32
heads = 2
positions = 96
[train]
batch_tokens = 384
precision = "fp32"
compile = false
[[stages]]
tokens = 3840
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, "utf-8")
    return path


@pytest.mark.parametrize("extra", ["", 'architecture = "llama"\nkv_heads = 1\ninner = 80'])
def test_flops_are_palm_s_with_the_lm_head_where_a_label_stands(file: Path, extra: str) -> None:
    file.write_text(RECIPE.replace("heads = 2", f"heads = 2\n{extra}"), "utf-8")
    recipe = Recipe.read(file)
    model = fresh_model(recipe.model, 0)
    layers = ("transformer.h.", "model.layers.")
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith(layers) and p.dim() == 2
    )
    head = model.lm_head.weight.numel()
    attention = 12 * 2 * 32 * 96
    # Every position labelled: 6N + 12·L·d·T a token, N with the LM head.
    assert flops_per_step(recipe, 100, 100) == 100 * (6 * (matrices + head) + attention)
    assert flops_per_step(recipe, 100, 50) == 100 * (6 * matrices + attention) + 50 * 6 * head


def test_made_up_records_fill_rows(file: Path) -> None:
    recipe = Recipe.read(file)
    schema = CommandSchema(default_axes(recipe.data.tasks))
    records = made_up_records(recipe, schema, 200)
    packer = Packer(records, schema, rows=4, length=96, dropout=0.1, seed=0)
    plan = packer.epoch(0)
    batch = packer.batch(0, 0, plan[0])
    assert (batch.segment >= 0).mean() > 0.7
    assert batch.ids.max() < 512


def test_the_command_prints_consistent_figures(file: Path) -> None:
    done = CliRunner().invoke(main, [str(file), "--steps", "3", "--json"], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert result["tokens_per_step"] == 384
    assert result["tokens_per_second"] == pytest.approx(384 / result["seconds_per_step"])
    assert result["mfu"] == pytest.approx(result["tflops"] / result["peak_tflops"])
    assert 0 < result["mfu"] < 1
    assert result["peak"] == "fp32 matmul measured here"


def test_a_recipe_that_is_missing_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_slm.distill.throughput", str(tmp_path / "none.toml")]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 8
    assert done.stderr.startswith("error: cannot read recipe")
    assert len(done.stderr.splitlines()) == 1
