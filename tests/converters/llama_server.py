"""llama.cpp's own server in this process (xllamacpp), to hold our files against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest


class LlamaServer:
    """One model, one thread. Raises what urllib raises."""

    def __init__(self, file: Path, positions: int) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed ([dev])")
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = positions, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity = False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text` as plain text: no token is added, no special token is read in it."""
        answer = self._post("/tokenize", content=text, add_special=False, parse_special=False)
        ids: list[int] = answer["tokens"]
        return ids

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The most likely tokens after `prompt`; end-of-text does not end them."""
        answer = self._post(
            "/completion",
            prompt=list(prompt),
            n_predict=new_tokens,
            top_k=1,
            samplers=["top_k"],
            return_tokens=True,
            cache_prompt=False,
        )
        ids: list[int] = answer["tokens"]
        return ids

    def log_shares(self, ids: Sequence[int], vocab_size: int) -> dict[int, float]:
        """Logarithms of the probabilities of the token after `ids`, by id, before a bias that
        makes it a letter: the server says nothing about an end or a part of a character."""
        answer = self._post(
            "/completion",
            prompt=list(ids),
            n_predict=1,
            n_probs=vocab_size,
            temperature=0.0,
            logit_bias=[[self.tokenize("a")[0], 1000.0]],
            cache_prompt=False,
        )
        (token,) = answer["completion_probabilities"]
        return {one["id"]: one["logprob"] for one in token["top_logprobs"]}

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        request = Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found
