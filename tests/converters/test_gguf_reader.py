"""Reading GGUF files: the same numbers as transformers and the gguf package read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_slm_converters.architectures import llama
from edge_slm_converters.gguf_reader import TYPES, read_gguf
from edge_slm_converters.gguf_tensors import joined, split, stored_names
from edge_slm_runtime.errors import CheckpointError

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

WIDTH, INNER, VOCABULARY = 256, 512, 64  # whole blocks of every type
SHAPE = {
    "context_length": 64,
    "embedding_length": WIDTH,
    "block_count": 1,
    "feed_forward_length": INNER,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
MATRICES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def write(
    file: Path,
    *,
    kind: str = "F32",
    change: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    architecture: str = "llama",
) -> dict[str, Any]:
    """A random Llama of one layer, matrices stored as `kind`; returns its matrices as read.
    change: of SHAPE, None leaves a key out. extra: further tensors."""
    draw = np.random.default_rng(1)
    qtype = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in {**SHAPE, **(change or {})}.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](f"{architecture}.{key}", value)
    tensors: dict[str, Any] = {"token_embd": draw.normal(0, 1, (VOCABULARY, WIDTH))}
    tensors["output_norm"] = tensors["blk.0.attn_norm"] = tensors["blk.0.ffn_norm"] = draw.normal(
        1, 0.1, WIDTH
    )
    found = {}
    for name, value in tensors.items():
        if f"{name}.weight" not in without:
            writer.add_tensor(f"{name}.weight", value.astype(np.float32))
    for name, shape in MATRICES.items():
        data = _stored(draw, shape, qtype)
        found[name] = gguf.quants.dequantize(data, qtype)
        if f"blk.0.{name}.weight" not in without:
            writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=qtype)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, np.asarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _stored(draw: Any, shape: tuple[int, int], qtype: Any) -> Any:
    """Random values as the type stores them. The gguf package cannot make K-quants: their
    blocks are random bytes, with small numbers for the half-precision scales."""
    try:
        return gguf.quants.quantize(draw.normal(0, 0.05, shape).astype(np.float32), qtype)
    except NotImplementedError:
        size, length = gguf.GGML_QUANT_SIZES[qtype]
        blocks = draw.integers(0, 256, (shape[0], shape[1] // size, length)).astype(np.uint8)
        scales = slice(length - 2, length) if qtype.name == "Q6_K" else slice(0, 4)
        halves = (scales.stop - scales.start) // 2
        small = draw.normal(0, 0.01, (*blocks.shape[:2], halves)).astype(np.float16)
        blocks[..., scales] = small.view(np.uint8)
        return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_decoded(kind: str, tmp_path: Path) -> None:
    stored = write(tmp_path / "m.gguf", kind=kind)
    model = read_gguf(tmp_path / "m.gguf")
    assert {name: value.shape for name, value in model.tensors.items()} == model.decoder.shapes()
    down = model.tensors["layers.0.down.weight"]
    assert np.array_equal(down, stored["ffn_down"].T)
    assert down.dtype == np.float32
    gate_up = np.concatenate([stored["ffn_gate"], stored["ffn_up"]]).T
    assert np.array_equal(model.tensors["layers.0.up.weight"], gate_up)
    # Pairs of a head side by side in the file, half a head apart in canonical form.
    query = stored["attn_q"].reshape(4, 32, 2, WIDTH).swapaxes(1, 2).reshape(WIDTH, WIDTH)
    assert np.array_equal(model.tensors["layers.0.qkv.weight"][:, :WIDTH], query.T)
    assert not model.tensors["layers.0.qkv.bias"].any()


def test_splitting_a_tensor_undoes_joining_it(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", extra={"blk.0.attn_q.bias": np.arange(WIDTH)} | BIASES)
    model = read_gguf(tmp_path / "m.gguf")
    for name, names in stored_names(model.decoder, llama.GGUF_PARTS):
        parts = split(model.decoder, model.tensors[name], names, llama.GGUF_INTERLEAVED)
        assert np.array_equal(
            joined(model.decoder, parts, llama.GGUF_INTERLEAVED), model.tensors[name]
        ), name


BIASES = {f"blk.0.{name}.bias": np.arange(WIDTH // 2) for name in ("attn_k", "attn_v")}


def test_rope_scaling_becomes_factors(tmp_path: Path) -> None:
    write(
        tmp_path / "linear.gguf",
        change={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    )
    assert read_gguf(tmp_path / "linear.gguf").decoder.rope_factors == (4.0,) * 32
    factors = np.linspace(1, 8, 32)
    write(tmp_path / "llama3.gguf", extra={"rope_freqs.weight": factors})
    found = read_gguf(tmp_path / "llama3.gguf").decoder.rope_factors
    assert found == pytest.approx(factors)


def test_a_head_of_its_own_unties_the_embedding(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", extra={"output.weight": np.ones((VOCABULARY, WIDTH))})
    model = read_gguf(tmp_path / "m.gguf")
    assert not model.decoder.tied
    assert model.tensors["head.weight"].all()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"architecture": "mamba"}, r"architecture 'mamba' cannot be converted.*llama"),
        ({"kind": "Q5_0"}, r"attn_q\.weight is stored as Q5_0.*Q4_K"),
        ({"change": {"rope.scaling.type": "yarn"}}, "'yarn' cannot be converted"),
        ({"change": {"attention.sliding_window": 16}}, "sliding window"),
        ({"change": {"expert_count": 8}}, r"llama\.expert_count = 8"),
        ({"change": {"rope.dimension_count": 32}}, "dimension_count is 32, heads are 64 wide"),
        ({"change": {"block_count": None}}, r"llama\.block_count must be a positive number"),
        ({"change": {"feed_forward_length": 500}}, r"layers\.0\.up\.weight of \[256, 1024\]"),
        ({"without": ("token_embd.weight",)}, r"missing token_embd\.weight"),
        ({"without": ("blk.0.ffn_up.weight",)}, r"missing blk\.0\.ffn_up\.weight"),
        ({"extra": {"blk.0.ffn_sub_norm.weight": [1.0]}}, r"unexpected blk\.0\.ffn_sub_norm"),
        ({"extra": {"output.weight": np.full((64, 256), np.nan)}}, "not finite"),
        ({"extra": {"blk.0.attn_v.bias": np.ones(128)}}, r"missing blk\.0\.attn_q\.bias"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(
    settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", **settings)
    with pytest.raises(CheckpointError, match=match):
        read_gguf(tmp_path / "m.gguf")


def test_torn_files_and_other_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    for name, data in {"torn": content[:-100], "start": content[:30], "text": b"hello" * 9}.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="is not a GGUF file"):
            read_gguf(file)
    with pytest.raises(CheckpointError, match="is missing"):
        read_gguf(tmp_path / "none.gguf")
