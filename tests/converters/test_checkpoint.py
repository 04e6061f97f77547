"""Reading checkpoints: every layout, and refusals that name the fault."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edge_slm_converters import random_checkpoint, read_checkpoint
from edge_slm_converters.architectures import gpt2
from edge_slm_converters.architectures.base import as_stored
from edge_slm_converters.sums import SUMS, check_sums, write_sums
from edge_slm_runtime.errors import CheckpointError, TargetExists

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(path: Path, edit: Edit) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def test_reads_what_was_written(tiny_checkpoint: Path) -> None:
    source = read_checkpoint(tiny_checkpoint)
    decoder = source.decoder
    assert (decoder.layers, decoder.heads, decoder.width, decoder.inner) == (2, 4, 64, 256)
    assert (decoder.vocab_size, len(source.tokens)) == (417, 400)
    assert source.parameters == sum(t.size for t in source.tensors.values())
    assert all(t.dtype == np.float32 for t in source.tensors.values())
    assert source.head is source.tensors["embedding"]
    assert {n: t.shape for n, t in source.tensors.items()} == decoder.shapes()
    assert set(source.digests()) == {
        "config.json",
        "tokenizer.json",
        "command.json",
        "model.safetensors",
    }


def test_names_with_and_without_prefix_and_old_buffers(copy: Path) -> None:
    before = read_checkpoint(copy)

    def bare(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 128, 128), bool)
        tensors["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    edit_tensors(copy, bare)
    after = read_checkpoint(copy)
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name], tensor)


def test_bf16_is_exact(copy: Path) -> None:
    expected = {}
    header, blob = {}, b""
    for name, tensor in load_file(copy / "model.safetensors").items():
        upper = (tensor.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [len(blob), len(blob) + upper.nbytes],
        }
        blob += upper.tobytes()
        expected[name] = (upper.astype(np.uint32) << 16).view(np.float32)
    text = json.dumps(header).encode()
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + blob)
    source = read_checkpoint(copy)
    stored = as_stored(gpt2.layout(source.decoder, {}), source.tensors)
    assert len(stored) == len(expected)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(tensor, expected[f"transformer.{name}"])


def test_all_faults_are_named_at_once(copy: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.extra.weight"] = np.zeros(3, np.float32)
        tensors["transformer.wpe.weight"] = np.zeros((4, 64), np.float32)
        tensors["transformer.h.1.ln_1.bias"][0] = np.nan

    edit_tensors(copy, spoil)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(copy)
    for fault in (
        "missing ln_f.bias",
        "unexpected extra.weight",
        "wpe.weight is [4, 64], config.json says [128, 64]",
        "h.1.ln_1.bias has values that are not finite",
    ):
        assert fault in error.value.problem
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"activation_function": "mish"}, "activation_function 'mish'"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_head": "4"}, "n_head"),
        ({"n_head": 5}, "not a multiple of n_head"),
        ({"n_inner": -1}, "n_inner"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
        ({"vocab_size": 300}, "wte.weight"),
        ({"tie_word_embeddings": False}, "missing lm_head.weight"),
    ],
)
def test_what_cannot_be_converted_is_named(copy: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(copy, **changes)
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(copy)


def test_tied_in_name_only_is_refused(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": np.zeros((417, 64), np.float32)}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        read_checkpoint(copy)


def test_integer_weights_are_refused(copy: Path) -> None:
    for dtype, name in ((np.int32, "I32"), (np.uint8, "U8"), (np.bool_, "BOOL")):
        zeros = {"transformer.ln_f.bias": np.zeros(64, dtype)}
        edit_tensors(copy, lambda t, zeros=zeros: t.update(zeros))
        with pytest.raises(CheckpointError, match=rf"ln_f\.bias is stored as {name}"):
            read_checkpoint(copy)


def test_a_mask_of_any_type_is_skipped(copy: Path) -> None:
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.int64)}
    edit_tensors(copy, lambda t: t.update(mask))
    assert not any("mask" in name for name in read_checkpoint(copy).tensors)


def test_pickles_are_never_opened(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        read_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "command.json"])
@pytest.mark.parametrize("content", [None, "", "[]", "{}", "{"])
def test_broken_text_files(copy: Path, name: str, content: str | None) -> None:
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"config|tokenizer|command"):
        read_checkpoint(copy)


def test_a_broken_lexicon(copy: Path) -> None:
    (copy / "words.txt").write_text("snow\nfox\n")
    with pytest.raises(CheckpointError, match=r"words.txt is no lexicon: .* not sorted"):
        read_checkpoint(copy)


def test_broken_weights(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        read_checkpoint(copy / "absent")
    whole = (copy / "model.safetensors").read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        (copy / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="safetensors"):
            read_checkpoint(copy)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "absent.safetensors", 3])
def test_shards_stay_in_the_folder(copy: Path, name: Any) -> None:
    index = {"weight_map": {"transformer.wte.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").rename(copy / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"leaves|no absent|no 3"):
        read_checkpoint(copy)


def test_a_single_file_counts_more_than_an_index(copy: Path) -> None:
    """As for transformers, which the peers of a benchmark read it with."""
    expected = read_checkpoint(copy).tensors["embedding"]
    shutil.copy(copy / "model.safetensors", copy / "old.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "old.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_tensors(copy, lambda t: t["transformer.wte.weight"].__imul__(2))
    np.testing.assert_array_equal(read_checkpoint(copy).tensors["embedding"], 2 * expected)


def test_a_tied_embedding_may_be_stored_as_the_head_alone(copy: Path) -> None:
    """safetensors' save_model keeps the first of the two names."""
    expected = read_checkpoint(copy).tensors["embedding"]
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    found = read_checkpoint(copy)
    assert found.decoder.tied
    np.testing.assert_array_equal(found.tensors["embedding"], expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 10**8),
        ("n_embd", 10**400),
        ("n_positions", 10**400),
        ("layer_norm_epsilon", math.inf),
        ("tie_word_embeddings", "false"),
        ("scale_attn_weights", "no"),
        ("activation_function", ["gelu"]),
    ],
)
def test_settings_are_checked_before_anything_of_their_size(
    copy: Path, key: str, value: Any
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} "):
        read_checkpoint(copy)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "command.json", "model.safetensors"]
)
def test_a_pipe_is_no_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(CheckpointError):
        read_checkpoint(copy)


def test_tokenizer_must_carry_the_control_tokens(copy: Path) -> None:
    command = json.loads((copy / "command.json").read_text())
    command["axes"][0]["values"][0] = "poem"
    (copy / "command.json").write_text(json.dumps(command))
    with pytest.raises(CheckpointError, match="control token"):
        read_checkpoint(copy)


def test_random_checkpoint_is_reproducible_and_overwrites_nothing(
    tiny_text_side: Path, tmp_path: Path
) -> None:
    shape = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 401, "positions": 8}
    one, two = (
        random_checkpoint(tmp_path / name, **shape, like=tiny_text_side, seed=3)
        for name in ("one", "two")
    )
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    with pytest.raises(TargetExists):
        random_checkpoint(one, **shape, like=tiny_text_side)
    with pytest.raises(CheckpointError, match="`like`"):
        random_checkpoint(tmp_path / "three", **shape, like=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_conversion_needs_no_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'optimum'): sys.modules[name] = None\n"
        "from edge_slm_converters import VARIANTS, convert\n"
        "convert(sys.argv[1], sys.argv[2], tuple(VARIANTS), accept=True)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tiny_checkpoint), str(tmp_path / "bundle")], check=True
    )
    assert (tmp_path / "bundle" / "manifest.json").is_file()


# -- sums of the files ---------------------------------------------------------------


@pytest.fixture
def summed(copy: Path) -> Path:
    (copy / "recipe.json").write_text("{}")
    write_sums(copy)
    return copy


def test_sums_are_those_of_sha256sum(summed: Path) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=summed, check=True)
    assert not done.returncode
    assert (summed / SUMS).read_text().count("\n") == 5
    assert len(read_checkpoint(summed).tokens) == 400
    assert SUMS not in read_checkpoint(summed).digests()  # nor in a bundle's provenance


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.json", "command.json"])
def test_a_file_that_was_changed_since_is_refused(name: str, summed: Path) -> None:
    content = bytearray((summed / name).read_bytes())
    content[-1] ^= 1
    (summed / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is not what was written.*remove {SUMS}"):
        read_checkpoint(summed)
    (summed / SUMS).unlink()
    check_sums(summed)  # as of another program


def test_a_file_that_is_cut_or_missing_is_refused(summed: Path) -> None:
    os.truncate(summed / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="is not what was written"):
        read_checkpoint(summed)
    (summed / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        read_checkpoint(summed)


@pytest.mark.parametrize(
    "line", ["", "x", f"{'0' * 64}  ../config.json", f"{'0' * 63}  config.json", "\ud800"]
)
def test_sums_that_are_damaged_are_refused(line: str, summed: Path) -> None:
    with (summed / SUMS).open("ab") as file:
        file.write(f"{line}\n".encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=f"{SUMS} (is damaged|cannot be read)"):
        read_checkpoint(summed)
