"""Samples that the tests make themselves: a small world of subjects, places and styles."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from edge_slm.distill.recipe import Recipe
from edge_slm.distill.samples import Sample

_SUBJECTS = (
    "red fox,old lighthouse,paper boat,brass robot,sleeping cat,stone bridge,glass whale".split(",")
)
_PLACES = "in the snow,by the sea,at dusk,under a bridge,in a quiet forest,on a rooftop".split(",")
_DETAILS = (
    "soft light,high detail,muted colours,a wide view,gentle rain,long shadows,warm tones".split(
        ","
    )
)


def made_samples(count: int, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        request = f"a {rng.choice(_SUBJECTS)} {rng.choice(_PLACES)}"
        details = rng.sample(_DETAILS, rng.randint(1, 5))
        if rng.random() < 0.6:
            samples.append(Sample(request, f"{request}, {', '.join(details)}", "image"))
        else:
            samples.append(Sample(request, ", ".join(details), "tags"))
    return samples


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "samples.jsonl"
    rows = [
        {"request": s.request, "response": s.response, "task": s.task} for s in made_samples(300)
    ]
    rows.append(
        {"request": None, "response": "a lone kite over a field, soft light", "task": "image"}
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "toy",
            "seed": 3,
            "data": {"tasks": ["image", "tags"], "holdout_percent": 10},
            "hindsight": {"cuts": {"image": 2, "tags": 1}, "fragments": {"image": 1}},
            "model": {
                "vocab_size": 512,
                "layers": 2,
                "width": 32,
                "heads": 2,
                "positions": 96,
                "dropout": 0.1,
            },
            "train": {
                "batch_tokens": 96 * 4,
                "warmup_steps": 2,
                "countdown": 0.2,
                "precision": "fp32",
                "compile": False,
                "save_every": 3,
                "evaluate_every": 4,
            },
            "stages": [{"tokens": 96 * 4 * 8, "learning_rate": 3e-3}],
            "explore": {
                "rounds": 1,
                "requests": 12,
                "best": 20,
                "bands": 2,
                "tokens": 96 * 4 * 4,
                "kl": 0.1,
                "entropy": 0.01,
            },
        }
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One embedding cache for all tests of this room."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def willing_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, made to like ending: answers of all lengths."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("willing") / "checkpoint"
    shutil.copytree(tiny_checkpoint, path)
    weights = load_file(path / "model.safetensors")
    name = next(name for name in weights if name.endswith("ln_f.bias"))
    embedding = weights[next(n for n in weights if n.endswith("wte.weight"))].float()
    weights[name] += (1.2 * embedding[0] / embedding[0].norm()).to(weights[name].dtype)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def willing_bundle(willing_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edge_slm_converters import convert

    path = tmp_path_factory.mktemp("willing") / "bundle"
    convert(willing_checkpoint, path, ("onnx-fp32",), accept=True)
    return path
