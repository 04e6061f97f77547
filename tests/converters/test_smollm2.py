"""SmolLM2-135M-Instruct from its GGUF file, whole: the same answers as transformers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_slm_converters import read_checkpoint
from edge_slm_converters.gguf_reader import read_gguf
from edge_slm_converters.quantise import PRECISIONS
from edge_slm_converters.variants import Model, open_variant, write_variant
from edge_slm_runtime import SLM, Request

from .smollm2 import gguf_file
from .test_gguf_tokenizer import texts

NEW_TOKENS, TOLERANCE = 64, 1e-3
TEXTS = (
    *("What is the capital of France?", "Write a haiku about snow.", "List three fruits."),
    *("def fib(n):", "What is 17 + 25?", "Translate 'good night' into German."),
    *("Describe a red fox in one sentence.", "Summarise: The cat sat on the mat.\nIt was raining."),
    *("Is water wet?", "Describe Zürich, 東京 and naïve façades."),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def transformers_model() -> Any:
    """What transformers reads from the file."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    file = gguf_file()
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def transformers_tokenizer() -> Any:
    """Likewise; its reader of GGUF files forgets to split digits."""
    transformers = pytest.importorskip("transformers")
    file = gguf_file()
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def slm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SLM]:
    source = read_checkpoint(gguf_file(), context=512)
    folder = tmp_path_factory.mktemp("smollm2")
    variant = write_variant("onnx-fp32", Model(source, PRECISIONS["fp32"]), folder)
    with open_variant(folder, source, variant) as opened:
        yield opened


def test_the_weights_are_those_that_transformers_reads(transformers_model: Any) -> None:
    import torch

    model = read_gguf(gguf_file())
    theirs = transformers_model.state_dict()
    layers = {
        "qkv.weight": [f"self_attn.{part}_proj" for part in "qkv"],
        "out.weight": ["self_attn.o_proj"],
        "up.weight": ["mlp.gate_proj", "mlp.up_proj"],
        "down.weight": ["mlp.down_proj"],
        "attention_norm.weight": ["input_layernorm"],
        "mlp_norm.weight": ["post_attention_layernorm"],
    }
    assert np.array_equal(model.tensors["embedding"], theirs["model.embed_tokens.weight"])
    assert np.array_equal(model.tensors["final_norm.weight"], theirs["model.norm.weight"])
    for i in range(model.decoder.layers):
        for ours, parts in layers.items():
            whole = torch.cat([theirs[f"model.layers.{i}.{part}.weight"] for part in parts])
            assert np.array_equal(model.tensors[f"layers.{i}.{ours}"].T, whole), f"{i} {ours}"
    decoder = model.decoder
    assert (decoder.heads, decoder.kv_heads, decoder.head_width) == (9, 3, 64)
    assert (decoder.positions, decoder.rope_theta, decoder.tied) == (8192, 100000.0, True)


def test_logits_and_greedy_answers_are_those_of_transformers(
    slm: SLM, transformers_model: Any
) -> None:
    """Every token of an answer is the likeliest one in one pass of transformers over prompt
    and answer: what its own greedy decoding would write."""
    import torch

    bare = {"no_repeat_ngram_size": 0, "no_repeat_words": False, "max_new_tokens": NEW_TOKENS}
    requests = [Request(text, **bare) for text in TEXTS]
    answers = slm.generate_batch(requests, len(requests))
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        prompt = slm.check(request).prompt
        ids = [*prompt, *answer.token_ids]
        with torch.no_grad():
            logits = transformers_model(torch.tensor([ids])).logits[0].numpy()
        if number < 4:
            assert np.abs(slm.logits(prompt) - logits[: len(prompt)]).max() < TOLERANCE
        expected = logits[len(prompt) - 1 :].argmax(-1).tolist()
        written = list(answer.token_ids)
        assert written == expected[: len(written)], request.request
        if answer.finish_reason == "stop":
            assert expected[-1] in (0, 2), request.request  # <|endoftext|>, <|im_end|>
        else:
            assert len(written) == NEW_TOKENS


def test_the_prompt_is_that_of_its_own_template(slm: SLM, transformers_tokenizer: Any) -> None:
    """SmolLM2's tokenizer and template as transformers applies them (no digits in the text:
    its reader of GGUF files forgets to split them)."""
    for text in ("Hello, how are you?", "def f(x):\n    return x", "東京 and naïve façades 🦊"):
        expected = transformers_tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        assert list(slm.check(Request(text)).prompt) == expected


def test_ids_are_those_of_transformers_where_it_splits_alike(transformers_tokenizer: Any) -> None:
    theirs = Tokenizer.from_str(transformers_tokenizer.backend_tokenizer.to_str())
    ours = Tokenizer.from_str(read_checkpoint(gguf_file()).text.tokenizer.decode("utf-8"))
    theirs.encode_special_tokens = ours.encode_special_tokens = True
    compared = 0
    for text in texts(3000, seed=3):
        if any(map(str.isnumeric, text)):
            continue
        found = ours.encode(text, add_special_tokens=False)
        assert found.ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(found.ids, skip_special_tokens=False) == text
        compared += 1
    assert compared > 500
