"""Bundles: whole or absent, measured, gated, and with goldens that hold."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edge_slm_runtime
from edge_slm_bench.metrics.fidelity import fidelity
from edge_slm_converters import (
    DEFAULT_VARIANTS,
    VARIANTS,
    Example,
    convert,
    gate,
    random_checkpoint,
)
from edge_slm_converters.distribution import write_reduced
from edge_slm_runtime.bundle import Variant
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import CheckpointError, GateRefused, TargetExists
from edge_slm_runtime.files import write_folder_aside
from edge_slm_runtime.memory import memory_estimate
from edge_slm_runtime.selftest import golden_answers

GOLDEN = Path(__file__).with_name("golden.json")


def test_bundle_is_what_its_manifest_says(tiny_bundle: Path) -> None:
    manifest = edge_slm_runtime.verify(tiny_bundle)
    assert [variant.name for variant in manifest.variants] == list(VARIANTS)
    assert manifest.name == "tiny"
    assert (manifest.model.layers, manifest.model.vocab_size) == (2, 417)
    for variant in manifest.variants:
        files = (tiny_bundle / variant.path).iterdir()
        assert variant.bytes == sum(file.stat().st_size for file in files)
        assert 0 < variant.weight_bytes_per_token < variant.bytes
        assert (variant.fidelity is None) == (variant.name == "onnx-fp32")
        assert variant.peak_rss_mb == pytest.approx(memory_estimate(manifest, variant), abs=0.1)
    assert set(manifest.provenance["checkpoint"]) >= {"config.json", "model.safetensors"}


def test_goldens_hold(tiny_bundle: Path) -> None:
    manifest = edge_slm_runtime.read_manifest(tiny_bundle)
    for variant in manifest.variants:
        with edge_slm_runtime.load(
            tiny_bundle, engine=variant.engine, precision=variant.precision
        ) as slm:
            for golden in manifest.goldens:
                ids = slm.greedy_ids(golden.request, golden.command, golden.max_new_tokens)
                assert ids == golden.ids[variant.name]


def test_greedy_output_of_a_fixed_model(tiny_text_side: Path, tmp_path: Path) -> None:
    """The float32 engines give, token for token, what was recorded in golden.json."""
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for name, text in recorded["text_side"].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    random_checkpoint(tmp_path / "model", **recorded["shape"], like=tmp_path)
    variants = ("onnx-fp32", "ctranslate2-float32")
    manifest = convert(tmp_path / "model", tmp_path / "bundle", variants)
    found = {golden.request: golden.ids for golden in manifest.goldens}
    for request, ids in recorded["greedy"].items():
        for variant in variants:
            assert list(found[request][variant]) == ids, (request, variant)


def test_default_variants(tiny_checkpoint: Path, tmp_path: Path) -> None:
    steps: dict[str, float] = {}
    manifest = convert(tiny_checkpoint, tmp_path / "b", accept=True, progress=steps.__setitem__)
    assert tuple(v.name for v in manifest.variants) == DEFAULT_VARIANTS
    lines, shares = list(steps), list(steps.values())
    assert lines[0] == "reading the checkpoint"
    assert {"writing onnx-int8", "quantising layer 2 of 2", "measuring numba-int4"} < set(lines)
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.9 < shares[-1] < 1  # the last step is still to come


def test_reference_is_dropped_when_not_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = convert(tiny_checkpoint, tmp_path / "b", ("onnx-int8",), accept=True, name="mine")
    assert [variant.name for variant in manifest.variants] == ["onnx-int8"]
    assert manifest.variants[0].fidelity is not None
    assert manifest.name == "mine"
    assert edge_slm_runtime.verify(tmp_path / "b") == manifest
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "manifest.json",
        "onnx-int8",
        "tokenizer.json",
    ]


def test_a_lexicon_goes_into_the_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    (source / "words.txt").write_text("a\nfox\nsnow\n")
    manifest = convert(source, tmp_path / "b", ("onnx-fp32",), accept=True)
    assert (tmp_path / "b/words.txt").read_text() == "a\nfox\nsnow\n"
    assert {"words.txt"} <= {*manifest.files} & {*manifest.provenance["checkpoint"]}
    reduced = write_reduced(tmp_path / "b", tmp_path / "c", ["onnx-fp32"])
    for bundle in (tmp_path / "b", reduced):
        with edge_slm_runtime.load(bundle) as slm:
            assert slm.check("a fox").known
            assert not slm.check(edge_slm_runtime.Request("a fox", known_words=False)).known
            for golden, ids in golden_answers(slm):
                assert ids == golden.ids["onnx-fp32"]


def test_gate_refuses_with_figures_and_records_acceptance(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        GateRefused, match=r"onnx-int4: top-1 agreement 0\.\d+ ± 0\.\d+ \(at least 0.95\)"
    ):
        convert(tiny_checkpoint, tmp_path / "b", ("onnx-int4",))
    assert not list(tmp_path.iterdir())
    manifest = convert(tiny_checkpoint, tmp_path / "b", ("onnx-int4",), accept=True)
    accepted = manifest.provenance["gate"]["accepted"]
    assert len(accepted) == 1
    assert accepted[0].startswith("onnx-int4")


def test_default_variants_outside_their_budget_are_left_out(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    manifest = convert(tiny_checkpoint, tmp_path / "b")  # random weights: int4 has no chance
    names = [variant.name for variant in manifest.variants]
    left_out = [line.partition(":")[0] for line in manifest.provenance["gate"]["left_out"]]
    assert "onnx-fp32" in names
    assert "onnx-int4" in left_out
    assert sorted(names + left_out) == sorted(DEFAULT_VARIANTS)
    assert {p.name for p in (tmp_path / "b").iterdir() if p.is_dir()} == set(names)
    edge_slm_runtime.verify(tmp_path / "b")


def measured(top1: float, ratio: float, error: float = 0.0) -> Variant:
    figures = {
        "positions": 9,
        "top1": top1,
        "top1_error": error,
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": error,
    }
    return Variant("onnx-int8", "onnxruntime", "int8", "onnx-int8", 1, 1, figures)


@pytest.mark.parametrize(
    ("top1", "ratio", "error", "refused", "undecided"),
    [
        (0.98, 1.01, 0.0, 0, 0),
        (0.9799, 1.0, 0.0, 1, 0),
        (0.97, 1.0, 0.006, 0, 1),
        (0.97, 1.0, 0.005, 1, 0),
        (0.99, 1.02, 0.006, 0, 1),
        (0.99, 1.02, 0.005, 1, 0),
    ],
)
def test_the_gate_refuses_beyond_doubt(
    top1: float, ratio: float, error: float, refused: int, undecided: int
) -> None:
    variants = [measured(top1, ratio, error)]
    assert len(gate.refusals(variants)) == refused
    assert len(gate.undecided(variants)) == undecided


def test_gate_refuses_figures_that_are_no_numbers() -> None:
    assert len(gate.refusals([measured(top1=1.0, ratio=math.nan)])) == 1
    with pytest.raises(ValueError, match="reference's logits are not finite"):
        fidelity(np.full((3, 5), np.nan), np.zeros((3, 5)), np.zeros(3, np.int64))


def test_a_variant_that_cannot_be_measured_is_left_out_alone(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Keys beyond half precision, which the numba engine has: the same function in float32."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    tensors = {k: v.astype(np.float32) for k, v in load_file(copy / "model.safetensors").items()}
    for name, value in tensors.items():
        if ".attn.c_attn." in name:
            third = value.shape[-1] // 3
            value[..., :third] *= 2.0**-20
            value[..., third : 2 * third] *= 2.0**20
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    manifest = convert(copy, tmp_path / "b", accept=True)
    left_out = [line.partition(":")[0] for line in manifest.provenance["gate"]["left_out"]]
    names = [variant.name for variant in manifest.variants]
    assert left_out
    assert all(name.startswith("numba") for name in left_out)
    assert sorted(names + left_out) == sorted(DEFAULT_VARIANTS)
    assert not any("numba" in line for line in manifest.provenance["gate"]["accepted"])
    with pytest.raises(GateRefused, match="numba-int8: the model's predictions are not finite"):
        convert(copy, tmp_path / "c", ("numba-int8",), accept=True)


def test_a_recipe_with_a_number_that_is_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (copy / "recipe.json").write_text('{"history": [{"valid_loss": NaN}]}')
    with pytest.raises(CheckpointError, match=r"recipe\.json holds a number that is not finite"):
        convert(copy, tmp_path / "b")


def test_broken_recipe_is_found_before_any_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (copy / "recipe.json").write_text("{oops")
    lines: list[str] = []
    with pytest.raises(CheckpointError, match=r"recipe\.json"):
        convert(copy, tmp_path / "b", progress=lambda line, _: lines.append(line))
    assert lines == ["reading the checkpoint"]


def test_own_evaluation_texts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = "warm light in the windows, soft evening sky, film grain"
    examples = [Example("a cabin", Command("image", 12, 9), text)] * 3
    manifest = convert(
        tiny_checkpoint, tmp_path / "b", ("onnx-int8",), accept=True, evaluation=examples
    )
    fidelity = manifest.variants[0].fidelity
    assert fidelity is not None
    assert fidelity["positions"] % 3 == 0
    assert fidelity["positions"] > 30
    with pytest.raises(CheckpointError, match="at least 2 positions"):
        convert(tiny_checkpoint, tmp_path / "c", ("onnx-int8",), evaluation=[])


def test_floats_pass_their_gate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "b", ("ctranslate2-float32",))


@pytest.mark.parametrize("variants", [(), ("onnx-int3",), ("onnx-int8", "gguf")])
def test_unknown_variants(tiny_checkpoint: Path, tmp_path: Path, variants: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError, match="variants"):
        convert(tiny_checkpoint, tmp_path / "b", variants)
    assert not list(tmp_path.iterdir())


def test_existing_target_is_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(TargetExists):
        convert(tiny_checkpoint, tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetExists):
        convert(tiny_checkpoint, tmp_path / "link")
    assert not list((tmp_path / "b").iterdir())


def test_failure_in_the_middle_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(line: str, done: float) -> None:
        if line == "writing the manifest":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint, tmp_path / "b", ("onnx-int8",), accept=True, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "b"

    def write() -> None:
        with write_folder_aside(target) as folder:
            (folder / "file").write_text("ours")
            target.mkdir()

    with pytest.raises(TargetExists):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert not list(target.iterdir())


def test_same_checkpoint_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one, two = (
        convert(tiny_checkpoint, tmp_path / n, ("onnx-int8", "ctranslate2-int8"), accept=True)
        for n in ("one", "two")
    )
    assert one.files == two.files
