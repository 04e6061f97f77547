"""Adapters: read from what peft writes, kept in files, merged into checkpoints."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from damage import bytes_damaged, fuzz, json_bytes, json_damaged, tried
from safetensors.numpy import load_file, save_file

from edge_slm.cli import main
from edge_slm_converters import convert, gate, read_checkpoint
from edge_slm_converters.arrays import Float32
from edge_slm_converters.deltas import merged, read_adapter
from edge_slm_converters.graph import write_graph
from edge_slm_runtime import verify
from edge_slm_runtime.deltas import Delta, Factors
from edge_slm_runtime.errors import AdapterInvalid, CheckpointError

from .conftest import IDS, Original, logits_of

RANK, ALPHA = 4, 8
GPT2_MODULES = {
    "attn.c_attn": (64, 192),
    "attn.c_proj": (64, 64),
    "mlp.c_fc": (64, 256),
    "mlp.c_proj": (256, 64),
}
LLAMA_MODULES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (64, 64)),
    **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (64, 32)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (64, 96)),
    "mlp.down_proj": (96, 64),
}
KINDS: dict[str, tuple[dict[str, Any], str, Mapping[str, tuple[int, int]]]] = {
    "gpt2": ({}, "transformer.h.", GPT2_MODULES),
    "llama": (
        {"model_type": "llama", "num_key_value_heads": 2},
        "model.layers.",
        LLAMA_MODULES,
    ),
}


def write_lora(
    folder: Path, before: str, modules: Mapping[str, tuple[int, int]], **settings: Any
) -> dict[str, tuple[Float32, Float32]]:
    """As peft saves it, of values that half precision has; module → its lora_A and lora_B."""
    folder.mkdir()
    random, found, tensors = np.random.default_rng(11), {}, {}
    for layer in range(2):
        for module, (inputs, outputs) in modules.items():
            a, b = (
                (random.integers(-8, 9, shape) / 32).astype(np.float32)
                for shape in ((RANK, inputs), (outputs, RANK))
            )
            name = f"{before}{layer}.{module}"
            found[name] = a, b
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({module.split(".")[1] for module in modules}),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "fan_in_fan_out": "c_attn" in modules,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return found


def adapted(
    model: Original, lora: Mapping[str, tuple[Float32, Float32]], scale: float, target: Path
) -> Float32:
    """transformers' logits with W + scale · B·A, as peft merges it (of Conv1D its transpose)."""
    target.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (target / name).write_bytes((model.path / name).read_bytes())
    tensors = load_file(model.path / "model.safetensors")
    for name, (a, b) in lora.items():
        change = scale * (b @ a)
        tensors[f"{name}.weight"] += change.T if "transformer.h" in name else change
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return logits_of(target, IDS)


@pytest.mark.parametrize("some", ["all", "first", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_what_peft_computes(
    original: Callable[..., Original], tmp_path: Path, kind: str, some: str
) -> None:
    settings, before, modules = KINDS[kind]
    names = {"all": list(modules), "first": list(modules)[:1], "last": list(modules)[-1:]}[some]
    model = original(**settings)
    lora = write_lora(tmp_path / "lora", before, {name: modules[name] for name in names})
    expected = adapted(model, lora, ALPHA / RANK, tmp_path / "adapted")
    source = read_checkpoint(model.path)
    delta = read_adapter(tmp_path / "lora", source)
    both = merged(source, [delta])
    (tmp_path / "onnx").mkdir()
    write_graph(both, "fp32", tmp_path / "onnx")
    logits = gate.onnx_logits(tmp_path / "onnx", both.decoder, "fp32")(IDS)
    assert np.abs(logits - expected).max() < 1e-4
    assert np.abs(logits - model.logits).max() > 0.1  # it has an effect
    assert both.base != source.base
    assert both.digests() == source.digests() | {"deltas/lora.safetensors": delta.digest}


def test_rank_stabilised_scale(original: Callable[..., Original], tmp_path: Path) -> None:
    source = read_checkpoint(original().path)
    write_lora(tmp_path / "usual", *KINDS["gpt2"][1:])
    write_lora(tmp_path / "rs", *KINDS["gpt2"][1:], use_rslora=True)
    usual, stabilised = (read_adapter(tmp_path / name, source) for name in ("usual", "rs"))
    for matrix in usual.factors:
        np.testing.assert_allclose(stabilised.of(matrix), usual.of(matrix) * 2, rtol=1e-5)


@pytest.fixture
def source(tiny_checkpoint: Path) -> Any:
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture
def delta(source: Any, tmp_path: Path) -> Delta:
    write_lora(tmp_path / "title-lora", *KINDS["gpt2"][1:])
    return read_adapter(tmp_path / "title-lora", source, task="title")


def test_file_gives_back_the_adapter(delta: Delta, source: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(delta.to_bytes())
    again = read_adapter(file, source)
    assert (again.name, again.task, again.base) == ("title-lora", "title", source.base)
    assert (again.digest, again.rank) == (delta.digest, RANK)
    assert set(load_file(file)) == {f"{m}.{x}" for m in source.decoder.matrices() for x in "ab"}
    for matrix in delta.factors:
        assert np.array_equal(again.of(matrix), delta.of(matrix))
    assert read_adapter(file, source, "other", "image").name == "other"


def test_small_factors_are_not_lost(original: Callable[..., Original], tmp_path: Path) -> None:
    """1e-7 and 1e3: below the smallest half, and not."""
    source = read_checkpoint(original().path)
    lora = write_lora(tmp_path / "x", *KINDS["gpt2"][1:])
    file = tmp_path / "x/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t * (1e-7 if "lora_B" in n else 1e3) for n, t in tensors.items()}, file)
    delta = read_adapter(tmp_path / "x", source)
    a, b = lora["transformer.h.0.attn.c_attn"]
    np.testing.assert_allclose(delta.of("layers.0.qkv"), (b @ a).T * 2e-4, atol=2e-7)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"c_attn": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 0}, "r is 0"),
        ({"r": 8}, "is not of rank 8"),
        ({"r": 10**400}, "r is 10+"),
        ({"lora_alpha": "8"}, "lora_alpha '8'"),
    ],
)
def test_settings_that_change_the_computation_are_refused(
    source: Any, tmp_path: Path, settings: dict[str, Any], what: str
) -> None:
    write_lora(tmp_path / "x", *KINDS["gpt2"][1:], **settings)
    with pytest.raises(CheckpointError, match=what):
        read_adapter(tmp_path / "x", source)


@pytest.mark.parametrize(
    ("module", "shape", "what"),
    [
        ("transformer.wte", (417, 64), "adapter of wte cannot be converted"),
        ("transformer.h.2.attn.c_attn", (64, 192), "h.2.attn.c_attn cannot"),
        ("transformer.h.0.attn.q_proj", (64, 64), "q_proj"),
        ("transformer.h.0.mlp.c_fc", (64, 128), r"c_fc has .*\[128, 4\], the layer is \[256, 64"),
    ],
)
def test_other_layers_are_refused_by_name(
    source: Any, tmp_path: Path, module: str, shape: tuple[int, int], what: str
) -> None:
    write_lora(tmp_path / "x", *KINDS["gpt2"][1:])
    file = tmp_path / "x/adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.{module}"
    tensors[f"{name}.lora_A.weight"] = np.ones((RANK, shape[0]), np.float32)
    tensors[f"{name}.lora_B.weight"] = np.ones((shape[1], RANK), np.float32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=what):
        read_adapter(tmp_path / "x", source)


def test_other_weights_are_refused(
    delta: Delta, source: Any, original: Callable[..., Original]
) -> None:
    other = read_checkpoint(original().path)
    with pytest.raises(AdapterInvalid, match="was made for other weights"):
        merged(other, [delta])
    with pytest.raises(AdapterInvalid, match="was made for other weights"):
        merged(merged(source, [delta]), [replace(delta, name="second")])
    with pytest.raises(AdapterInvalid, match="two adapters are named title-lora"):
        merged(source, [delta, delta])
    with pytest.raises(AdapterInvalid, match=r"changes 'layers\.7\.qkv'"):
        merged(source, [replace(delta, factors={"layers.7.qkv": delta.factors["layers.0.qkv"]})])


def test_two_adapters_add_up(delta: Delta, source: Any) -> None:
    both = merged(source, [delta, replace(delta, name="second")])
    name = "layers.1.down"
    change = both.tensors[f"{name}.weight"] - source.tensors[f"{name}.weight"]
    np.testing.assert_allclose(change, 2 * delta.of(name), atol=1e-6)
    assert source.merged == {}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "x" * 65, "a b"])
def test_names_are_those_of_files(delta: Delta, name: str) -> None:
    with pytest.raises(AdapterInvalid, match="is named"):
        replace(delta, name=name)


def test_values_are_finite_and_factors_fit(delta: Delta) -> None:
    ones = np.ones((64, 4), np.float16)
    for a, b in ((ones * np.float16(np.nan), ones.T), (ones, ones), (ones[:, :0], ones.T[:0])):
        with pytest.raises(AdapterInvalid):
            replace(delta, factors={"layers.0.out": Factors(a, b)})


def test_command_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "my-lora", *KINDS["gpt2"][1:])
    file, base = tmp_path / "a.safetensors", str(tiny_checkpoint)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    line = run("adapter", tmp_path / "my-lora", file, "--base", base, "--task", "title")
    assert "my-lora, rank 4" in line
    assert Delta.read(file).task == "title"
    usual = ("--variants", "onnx-fp32", "--json")
    provenance = {
        name: json.loads(run("convert", base, tmp_path / name, *usual, *extra))["provenance"]
        for name, extra in {
            "plain": (),
            "folder": ("--adapter", tmp_path / "my-lora"),
            "file": ("--adapter", file),
            "beside": ("--side-adapter", file),
        }.items()
    }
    plain, *merged_ones, beside = (
        (tmp_path / name / "onnx-fp32/model.data").read_bytes() for name in provenance
    )
    assert plain == beside != merged_ones[0] == merged_ones[1]
    assert verify(tmp_path / "beside").deltas == ["deltas/my-lora.safetensors"]
    assert (tmp_path / "beside/deltas/my-lora.safetensors").read_bytes() == file.read_bytes()
    assert "my-lora" in run("info", tmp_path / "beside")
    with pytest.raises(AdapterInvalid, match="other weights"):
        convert(tiny_checkpoint, tmp_path / "x", adapters=[replace(Delta.read(file), base="x")])
    with pytest.raises(AdapterInvalid, match="two adapters are named my-lora"):
        convert(tiny_checkpoint, tmp_path / "x", adapters=[Delta.read(file)] * 2)
    assert not (tmp_path / "x").exists()
    assert provenance["file"]["checkpoint"]["deltas/my-lora.safetensors"] == Delta.read(file).digest
    assert "deltas/my-lora.safetensors" not in provenance["plain"]["checkpoint"]


@fuzz("adapter", 300)
def test_any_file(delta: Delta, tmp_path: Path, seed: str) -> str:
    choice, content, file = random.Random(seed), delta.to_bytes(), tmp_path / "x.safetensors"
    if choice.random() < 0.3:
        content = bytes_damaged(choice, content)
    else:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json_bytes(choice, json_damaged(choice, json.loads(content[8:end])))
        content = len(header).to_bytes(8, "little") + header + content[end:]
    file.write_bytes(tried(file.name, content))
    try:
        found = Delta.read(file)
    except AdapterInvalid as error:
        return str(error)
    assert found.rank > 0
    assert Delta._parsed(found.to_bytes()).digest == found.digest
    return ""
