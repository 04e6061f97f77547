"""Models of others, chat and plain, as a Hugging Face folder and as a GGUF file: converted, checked
and asked on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_slm.cli import main
from edge_slm_bench.quick import requests_of
from edge_slm_converters import (
    VARIANTS,
    calibration_texts,
    convert,
    goldens,
    read_checkpoint,
)
from edge_slm_converters.architectures import llama
from edge_slm_converters.architectures.base import as_stored
from edge_slm_converters.gguf_writer import write_gguf
from edge_slm_converters.peers import make
from edge_slm_runtime import read_manifest
from edge_slm_runtime.command import Command
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError, NoCommandGrammar

from .test_prompts import SMOLLM2

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = ("user assistant system You are a helpful AI assistant", "a fox in the snow, 1234 foxes")
SHAPE: dict[str, Any] = {
    "architecture": "llama",
    **{"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "head_width": 16, "inner": 96},
    **{"vocab_size": 403, "positions": 256, "norm": "rms", "norm_epsilon": 1e-5},
    **{"position": "rotary", "rope_theta": 10000.0, "mlp": "gated", "activation": "silu"},
    **{"attention_scale": (0.25, 0.25), "tied": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with SmolLM2's way of splitting text, marks and template."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("chat") / "model"
    path.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    decoder, draw = Decoder(**SHAPE), np.random.default_rng(3)
    tensors = {
        name: draw.normal(1 if "norm" in name else 0, 0.2, shape).astype(np.float32)
        for name, shape in decoder.shapes().items()
    }
    config = llama.config(decoder) | {"eos_token_id": 2}
    stored = as_stored(llama.layout(decoder, config), tensors)
    save_file(
        {f"model.{name}": np.ascontiguousarray(value) for name, value in stored.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (path / "config.json").write_text(json.dumps(config))
    settings = {"chat_template": SMOLLM2, "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    out = folder.parent / "bundle"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(goldens, "EXAMPLES", 4)
        convert(folder, out, [name for name in VARIANTS if "int4" not in name], accept=True)
    return out


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def test_the_form_is_recognised_and_nothing_of_commands_is_measured(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    form = manifest.prompt
    assert (form.kind, form.ends) == ("chat", ("<|im_end|>", "<|endoftext|>"))
    assert form.before.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert form.after == "<|im_end|>\n<|im_start|>assistant\n"
    assert [v.adherence for v in manifest.variants] == [None] * len(manifest.variants)
    assert all(v.fidelity for v in manifest.variants if v.name != "onnx-fp32")
    assert all(golden.command == Command() for golden in manifest.goldens)
    digests = manifest.provenance["checkpoint"]
    assert set(digests) == {
        *("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    }


def test_every_command_line_works_with_a_chat(bundle: Path) -> None:
    assert run("verify", bundle, "--goldens").exit_code == 0
    shown = run("info", bundle).stdout
    assert "<|im_start|>assistant" in shown
    assert "ends with" in shown
    said = run("generate", "hello", "--bundle", bundle, "--max-new-tokens", 12, "--threads", 1)
    assert said.exit_code == 0
    refused = run("generate", "hello", "--bundle", bundle, "--task", "image")
    assert refused.exit_code == NoCommandGrammar.exit_code
    assert refused.stderr.startswith("error[no_command_grammar]: task cannot be asked of this")
    lines = [{"id": 1, "request": "a\nb"}, {"id": 2, "request": "c", "task": "image"}]
    lines += [{"id": 3, "request": "d", "task": None, "words": 3}]
    batch = run(
        *("batch", "-", "--bundle", bundle, "--max-new-tokens", 60, "--threads", 1),
        stdin="".join(json.dumps(line) + "\n" for line in lines),
    )
    good, bad, short = map(json.loads, batch.stdout.splitlines())
    assert good["text"] is not None
    assert bad["error"]["code"] == "no_command_grammar"
    assert short["asked_words"] == 3


def test_the_bench_asks_chats_too(bundle: Path) -> None:
    requests = requests_of(read_manifest(bundle))
    assert all(set(request) == {"request", "words"} for request in requests.values())


def test_a_gguf_file_is_the_same_model(folder: Path, bundle: Path, tmp_path: Path) -> None:
    write_gguf(read_checkpoint(folder), tmp_path / "m.gguf", "F32")
    _add_template(tmp_path / "m.gguf", tmp_path / "chat.gguf", SMOLLM2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(goldens, "EXAMPLES", 4)
        converted = run(
            *("convert", tmp_path / "chat.gguf", tmp_path / "b", "--accept"),
            *("--variants", "onnx-fp32,numba-int8", "--context", "160"),
        )
    assert converted.exit_code == 0, converted.stderr
    here, there = read_manifest(tmp_path / "b"), read_manifest(bundle)
    assert here.prompt == there.prompt
    assert here.model.positions == 160
    for ours, theirs in zip(here.goldens, there.goldens, strict=True):
        # Int8 is calibrated in the whole context only: 160 tokens are too few.
        assert ours.ids["onnx-fp32"] == theirs.ids["onnx-fp32"]
        assert ours.ids["numba-int8"]
    assert set(here.provenance["checkpoint"]) == {"chat.gguf"}


def test_data_of_a_chat_is_plain_texts(folder: Path, tmp_path: Path) -> None:
    data, file = tmp_path / "samples.jsonl", tmp_path / "m.gguf"
    rows = [
        {"request": f"a fox {i}", "response": f"fox {i} in the snow", "task": "image"}
        for i in range(200)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    write_gguf(read_checkpoint(folder), file, "F32")
    arguments = ("--variants", "onnx-int8", "--accept", "--context", "160", "--data", data)
    converted = run("convert", file, tmp_path / "b", *arguments)
    assert converted.exit_code == 0, converted.stderr
    (variant,) = read_manifest(tmp_path / "b").variants
    assert variant.adherence is None
    assert variant.fidelity
    assert 20 < variant.fidelity["positions"] < 1000


def test_peers_read_a_gguf_file_as_a_folder(folder: Path, tmp_path: Path) -> None:
    source = read_checkpoint(folder)
    write_gguf(source, tmp_path / "m.gguf", "F32")
    spec = make("transformers-fp32", tmp_path / "m.gguf", tmp_path, context=160)
    written = read_checkpoint(spec.path)
    assert written.decoder.positions == 160
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(written.tensors[name], tensor)


def _add_template(file: Path, out: Path, template: str) -> None:
    """The same file with a chat template and Llama's key for the end of a turn."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_without_a_template_a_folder_is_plain(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    form = read_checkpoint(tmp_path).form
    assert (form.kind, form.before, form.ends) == ("plain", "", ("<|im_end|>", "<|endoftext|>"))
    (tmp_path / "chat_template.jinja").write_text(SMOLLM2)
    assert read_checkpoint(tmp_path).form.kind == "chat"
    assert read_checkpoint(tmp_path, prompt="plain").form.kind == "plain"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointError, match="templates are never run"):
        read_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["chat", "plain"])
def test_int4_is_calibrated_on_such_answers_too(form: str, folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(goldens, "EXAMPLES", 4)
        patched.setattr(calibration_texts, "SAMPLES", (64, 64))
        source = read_checkpoint(folder, prompt="plain" if form == "plain" else None)
        convert(source, tmp_path / "b", ["onnx-int4", "numba-int4"], accept=True)
    manifest = read_manifest(tmp_path / "b")
    assert manifest.prompt.kind == form
    assert all(variant.fidelity for variant in manifest.variants)
    assert run("verify", tmp_path / "b", "--goldens").exit_code == 0


def test_a_context_is_within_the_models(folder: Path, tiny_checkpoint: Path) -> None:
    assert read_checkpoint(folder, context=100).decoder.positions == 100
    learned, whole = read_checkpoint(tiny_checkpoint, context=100), read_checkpoint(tiny_checkpoint)
    assert learned.tensors["positions"].shape == (100, 64)
    assert whole.parameters - learned.parameters == 28 * 64
    for context in (0, 129):
        with pytest.raises(CheckpointError, match="not within the model's 128"):
            read_checkpoint(tiny_checkpoint, context=context)
