"""SmolLM2-135M-Instruct from its GGUF file, whole: the same answers as transformers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_slm_converters import read_checkpoint
from edge_slm_converters.quantise import PRECISIONS
from edge_slm_converters.variants import Model, open_variant, write_variant
from edge_slm_runtime import SLM, Request

from .smollm2 import gguf_file

NEW_TOKENS, TOLERANCE = 64, 1e-3
TEXTS = (
    *("What is the capital of France?", "Write a haiku about snow.", "List three fruits."),
    *("def fib(n):", "What is 17 + 25?", "Translate 'good night' into German."),
    *("Describe a red fox in one sentence.", "Summarise: The cat sat on the mat.\nIt was raining."),
    *("Is water wet?", "Describe Zürich, 東京 and naïve façades."),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SLM]:
    source = read_checkpoint(gguf_file(), context=512)
    folder = tmp_path_factory.mktemp("smollm2")
    variant = write_variant("onnx-fp32", Model(source, PRECISIONS["fp32"]), folder)
    with open_variant(folder, source, variant) as opened:
        yield opened


def test_logits_and_greedy_answers_are_those_of_transformers(
    slm: SLM, transformers_smollm2: Any
) -> None:
    """Every token of an answer is the likeliest one in one pass of transformers over prompt
    and answer: what its own greedy decoding would write."""
    import torch

    bare = {"no_repeat_ngram_size": 0, "max_new_tokens": NEW_TOKENS}
    requests = [Request(text, **bare) for text in TEXTS]
    answers = slm.generate_batch(requests, len(requests))
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        prompt = slm.check(request).prompt
        ids = [*prompt, *answer.token_ids]
        with torch.no_grad():
            logits = transformers_smollm2(torch.tensor([ids])).logits[0].numpy()
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
