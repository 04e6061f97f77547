"""The GGUF file: its structure as the gguf package reads it, and what llama.cpp makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_slm_bench.runners import Prompt, Spec, open_runner
from edge_slm_converters.checkpoint import Checkpoint, read_checkpoint
from edge_slm_converters.gguf_reader import read_gguf
from edge_slm_converters.gguf_writer import BLOCKS, head_type, step_bytes, write_gguf
from edge_slm_runtime.errors import CheckpointError, TargetExists

from .greedy import greedy_ids
from .llama_server import LlamaServer

TEXT = "ein kleines Café in Zürich, 東京の夜景, naïve façade, emoji 🦊🌲"

gguf = pytest.importorskip("gguf", reason="gguf is not installed ([peers])")
PROMPT = Prompt("", 0, tuple(range(70, 86)))
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with an LM head of its own, and biases that are not zero."""
    draw = np.random.default_rng(5)
    tensors = {
        name: draw.normal(0, 0.1, value.shape).astype(np.float32) if "bias" in name else value
        for name, value in checkpoint.tensors.items()
    }
    tensors["head.weight"] = draw.normal(0, 0.2, tensors["embedding"].shape).astype(np.float32)
    return replace(checkpoint, decoder=replace(checkpoint.decoder, tied=False), tensors=tensors)


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata values, and tensors by name."""
    reader = gguf.GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {tensor.name: tensor for tensor in reader.tensors}


def test_metadata_says_what_the_checkpoint_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    values, _ = read(tmp_path / "m.gguf")
    assert values["general.architecture"] == "gpt2"
    shape = {key.removeprefix("gpt2."): value for key, value in values.items() if "gpt2." in key}
    assert shape == {
        "vocab_size": 417,
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
    }
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert not values["tokenizer.ggml.add_bos_token"]
    assert "tokenizer.chat_template" not in values


def test_control_tokens_and_padding_are_typed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    values, _ = read(tmp_path / "m.gguf")
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    controls, size = len(checkpoint.codec.controls), len(checkpoint.tokens)
    assert tuple(tokens[:size]) == checkpoint.tokens
    assert len(set(tokens)) == 417
    assert set(types[:controls]) == {gguf.TokenType.CONTROL}
    assert set(types[controls:size]) == {gguf.TokenType.NORMAL}
    assert set(types[size:]) == {gguf.TokenType.UNUSED}


@pytest.mark.parametrize("quantisation", BLOCKS)
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_hold_the_weights_in_the_types_of_llama_quantize(
    checkpoint: Checkpoint, untied: Checkpoint, tied: bool, quantisation: Any, tmp_path: Path
) -> None:
    source = checkpoint if tied else untied
    per_step = write_gguf(source, tmp_path / "m.gguf", quantisation)
    _, tensors = read(tmp_path / "m.gguf")
    assert ("output.weight" in tensors) is not tied
    matrices = [name for name in tensors if ".attn_qkv.w" in name or ".ffn_" in name]
    for name, tensor in tensors.items():
        expected = "F32"
        if name in ("token_embd.weight", "output.weight"):
            is_head = tied or name == "output.weight"
            expected = head_type(quantisation) if is_head else quantisation
        elif name.endswith("weight") and "norm" not in name and "position" not in name:
            expected = quantisation
        assert tensor.tensor_type.name == expected, name
    assert matrices
    back = gguf.quants.dequantize(
        tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type
    ).reshape(256, 64)
    error = np.abs(back - source.tensors["layers.1.up.weight"].T).max()
    assert error <= {"F32": 0, "F16": 1e-3, "Q8_0": 5e-3, "Q4_0": 0.08}[quantisation]
    read_by_a_step = [
        t.n_bytes
        for name, t in tensors.items()
        if t.data.ndim == 2 and name != "position_embd.weight"
        if tied or name != "token_embd.weight"
    ]
    assert per_step == sum(read_by_a_step) == step_bytes(source.decoder, quantisation)


def test_rows_that_are_not_whole_blocks_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    decoder = replace(checkpoint.decoder, inner=250)
    tensors = dict(checkpoint.tensors)
    for i in range(2):
        tensors[f"layers.{i}.up.weight"] = tensors[f"layers.{i}.up.weight"][:, :250]
        tensors[f"layers.{i}.up.bias"] = tensors[f"layers.{i}.up.bias"][:250]
        tensors[f"layers.{i}.down.weight"] = tensors[f"layers.{i}.down.weight"][:250]
    odd = replace(checkpoint, decoder=decoder, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"layers\.0\.down\.weight.*250.*blocks of 32"):
        write_gguf(odd, tmp_path / "m.gguf", "Q4_0")
    assert not list(tmp_path.iterdir())
    write_gguf(odd, tmp_path / "m.gguf", "F16")


def test_what_llama_cpp_cannot_compute_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for change in ({"activation": "relu"}, {"attention_scale": (0.25, 0.125)}):
        other = replace(checkpoint, decoder=replace(checkpoint.decoder, **change))
        with pytest.raises(CheckpointError, match=r"llama\.cpp"):
            write_gguf(other, tmp_path / "m.gguf", "F32")


def test_a_pre_tokenizer_without_a_name_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = json.loads(checkpoint.text.tokenizer)
    data["pre_tokenizer"]["add_prefix_space"] = True
    other = replace(checkpoint.text, tokenizer=json.dumps(data).encode())
    with pytest.raises(CheckpointError, match="pre_tokenizer"):
        write_gguf(replace(checkpoint, text=other), tmp_path / "m.gguf", "F32")


def test_nothing_is_overwritten_or_left_behind(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "new" / "m.gguf"
    write_gguf(checkpoint, file, "Q8_0")
    assert [path.name for path in file.parent.iterdir()] == ["m.gguf"]
    with pytest.raises(TargetExists):
        write_gguf(checkpoint, file, "Q8_0")


def test_without_the_package_the_extra_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from pathlib import Path\n"
        "from edge_slm_converters.checkpoint import read_checkpoint\n"
        "from edge_slm_converters.gguf_writer import write_gguf\n"
        f"write_gguf(read_checkpoint({str(tiny_checkpoint)!r}), Path({str(tmp_path)!r}), 'F16')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "DependencyMissing" in ended.stderr
    assert "pip install 'edge-slm[convert]'" in ended.stderr


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one kv head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "rope_theta": 1000.0},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "llama3 scaling": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
}


@pytest.fixture(params=LLAMAS)
def llama(request: pytest.FixtureRequest, tiny_text_side: Path, tmp_path: Path) -> Any:
    """(checkpoint, greedy ids after PROMPT by transformers) of a random Llama."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    small |= {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 417}
    small |= {"max_position_embeddings": 128, "initializer_range": 0.2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**{**small, **ends, **LLAMAS[request.param]})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    path = tmp_path / "llama"
    model.save_pretrained(path)
    for name in ("tokenizer.json", "command.json"):
        shutil.copyfile(tiny_text_side / name, path / name)
    ids = list(PROMPT.ids)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return read_checkpoint(path), ids[len(PROMPT.ids) :]


class TestLlamaCpp:
    """llama.cpp computes from our files what the models are."""

    @pytest.mark.parametrize("quantisation", ["F32", "F16"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_greedy_tokens_of_a_gpt2_are_those_of_our_fp32_graph(
        self,
        checkpoint: Checkpoint,
        untied: Checkpoint,
        tied: bool,
        quantisation: Any,
        tmp_path: Path,
    ) -> None:
        source = checkpoint if tied else untied
        expected = greedy_ids(source, tmp_path / "onnx", PROMPT.ids, NEW_TOKENS)
        write_gguf(source, tmp_path / "m.gguf", quantisation)
        server = LlamaServer(tmp_path / "m.gguf", 128)
        assert server.greedy(PROMPT.ids, NEW_TOKENS) == list(expected)

    def test_greedy_tokens_of_a_llama_are_those_of_transformers(
        self, llama: tuple[Checkpoint, list[int]], tmp_path: Path
    ) -> None:
        source, expected = llama
        write_gguf(source, tmp_path / "m.gguf", "F32")
        server = LlamaServer(tmp_path / "m.gguf", 128)
        assert server.greedy(PROMPT.ids, NEW_TOKENS) == expected

    def test_a_written_llama_is_read_again(
        self, llama: tuple[Checkpoint, list[int]], tmp_path: Path
    ) -> None:
        source, _ = llama
        write_gguf(source, tmp_path / "m.gguf", "F32")
        again = read_gguf(tmp_path / "m.gguf")
        assert again.decoder == replace(
            source.decoder,
            norm_epsilon=pytest.approx(source.decoder.norm_epsilon),
            rope_factors=pytest.approx(source.decoder.rope_factors),
        )
        for name, tensor in source.tensors.items():
            np.testing.assert_array_equal(again.tensors[name], tensor, name)

    def test_text_becomes_the_same_ids(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        write_gguf(checkpoint, tmp_path / "m.gguf", "F16")
        server = LlamaServer(tmp_path / "m.gguf", 128)
        spelt = f"{checkpoint.tokens[0]} and {checkpoint.tokens[1]}<|padding:410|>"
        for text in (TEXT, spelt, "it's  3 o'clock,\n\n  we'll see!"):
            assert server.tokenize(text) == checkpoint.codec.encode(text)


class TestRunner:
    """The speed peer: llama.cpp through llama-cpp-python, compiled by `make peers`."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed ([peers])")

    def test_greedy_tokens_are_those_of_our_fp32_graph(
        self, checkpoint: Checkpoint, tmp_path: Path
    ) -> None:
        expected = greedy_ids(checkpoint, tmp_path / "onnx", PROMPT.ids, NEW_TOKENS)
        write_gguf(checkpoint, tmp_path / "m.gguf", "F16")
        runner = open_runner(spec(tmp_path / "m.gguf"), 2)
        try:
            assert runner.single(PROMPT, NEW_TOKENS).ids == expected
        finally:
            runner.close()


def spec(file: Path) -> Spec:
    return Spec("llama_cpp", "llama.cpp", "llama.cpp", "f16", str(file), 0, 0, True)
