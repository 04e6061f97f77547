"""Models for all rooms: tiny, random, made once per test run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from edge_slm_converters import random_checkpoint
from edge_slm_runtime import read_manifest
from edge_slm_runtime.command import CommandSchema, default_axes
from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.kernels import compiled
from edge_slm_runtime.prompt import PromptForm

# `make test` tries the same examples every time; `make fuzz` searches (tests/fuzz.py).
settings.register_profile("test", derandomize=True, database=None, deadline=None)
settings.register_profile("fuzz", database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


def pytest_configure() -> None:
    """A worker (`pytest -n 2`) has a core for itself: threads that wait for each other by
    spinning, as those of the engines do, take many times as long where others compute too.

    What a script starts in the background ignores Ctrl-C, and so would all that the tests start.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


TASKS = ("image", "video", "title")
SENTENCES = (
    "a cosy cabin in the snow, warm light in the windows, soft evening sky",
    "slow drone shot over a misty forest at dawn, birds rising from the trees",
    "portrait of an old fisherman, weathered face, dramatic side light, film grain",
    "neon street in the rain, reflections on wet asphalt, people with umbrellas",
    "ein kleines Café in Zürich, früh am Morgen, 東京の夜景, naïve façade, emoji 🦊🌲",
)


@pytest.fixture(scope="session", autouse=True)
def object_files() -> Iterator[dict[Traits, bytes]]:
    """Of the kernels that this process has compiled: slow processors take a minute for each."""
    found: dict[Traits, bytes] = {}
    compiling = compiled._object_file

    def kept(traits: Traits) -> bytes:
        if traits not in found:
            found[traits] = compiling(traits)
        return found[traits]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiled, "_object_file", kept)
        yield found


@pytest.fixture(scope="session")
def tiny_text_side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json (byte-level BPE, 400 tokens) and command.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("text")
    schema = CommandSchema(default_axes(TASKS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=schema.special_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "command.json").write_text(json.dumps(schema.to_json()), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_text_side: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2, 2 layers of 64, with a vocabulary padded to 417 (on purpose not
    a multiple of anything) and logits spread widely enough to have clear winners."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    random_checkpoint(
        path,
        layers=2,
        width=64,
        heads=4,
        vocab_size=417,
        positions=128,
        like=tiny_text_side,
        seed=7,
        std=0.2,
    )
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint converted to every variant."""
    from edge_slm_converters import VARIANTS, calibration_texts, convert

    path = tmp_path_factory.mktemp("bundles") / "tiny"
    # Random weights have no fidelity budget to keep.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calibration_texts, "SAMPLES", (64, 64))  # to calibrate random weights
        convert(tiny_checkpoint, path, tuple(VARIANTS), accept=True)
    return path


@pytest.fixture(scope="session")
def with_grammar(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Makes a copy of the tiny bundle whose command schema has these fields."""
    from edge_slm_converters.bundle_writer import save_manifest

    def copy(**fields: Any) -> Path:
        target = tmp_path_factory.mktemp("grammar") / "bundle"
        shutil.copytree(tiny_bundle, target)
        manifest = read_manifest(target)
        prompt = PromptForm.commanded(replace(manifest.prompt.grammar, **fields))
        save_manifest(replace(manifest, prompt=prompt), target)
        return target

    return copy
