"""Fidelity and adherence of every variant, from one evaluation set.

Fidelity compares teacher-forced predictions on the responses with those of a
reference; adherence lets the model alone (no length promise) answer the same
requests under the words of their references, and counts the words of the answers. Each
variant runs in fresh processes, and our own in all ways of decoding, which must agree
(`edge_slm_bench.consistency`).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_bench.consistency import count_mismatches, plain_answers
from edge_slm_bench.metrics.examples import Example, to_scored
from edge_slm_bench.metrics.fidelity import fidelity
from edge_slm_bench.metrics.quality import spearman, within_tolerance
from edge_slm_bench.process import launch
from edge_slm_bench.results import Quality
from edge_slm_bench.runners import Float32, Spec
from edge_slm_bench.sweep import Model
from edge_slm_runtime.bundle import TOKENIZER
from edge_slm_runtime.command import count_words
from edge_slm_runtime.errors import EdgeSlmError
from edge_slm_runtime.text import TextCodec

REFERENCES = ("transformers-fp32", "onnx-fp32")  # the first that a model has


def assess(
    model: Model,
    examples: Sequence[Example],
    threads: int,
    done: Callable[[str], None] = lambda variant: None,
) -> list[Quality]:
    """One Quality per variant and peer; what fails becomes its reason.

    done: called with a variant's name after it.
    """
    named = {spec.variant for spec in model.specs}
    reference = next((name for name in REFERENCES if name in named), "")
    codec = TextCodec(model.bundle / TOKENIZER, model.manifest.prompt)
    positions = model.manifest.model.positions
    scored = to_scored(examples, codec, positions)
    targets = np.array([token for s in scored for token in s.ids[s.prompt :]], np.int64)
    requests = [_request(model, codec, example) for example in examples]
    specs = model.as_shipped
    digest = hashlib.sha256(repr(list(examples)).encode()).hexdigest()[:12]
    about = f"{len(scored)} responses, {len(targets)} tokens, digest {digest}"
    qualities: list[Quality] = []
    with tempfile.TemporaryDirectory(prefix="edge-slm-bench-") as scratch:

        def logits(spec: Spec) -> Float32:
            out = str(Path(scratch) / "logits.npy")
            job = {"kind": "logits", "spec": spec.as_dict(), "threads": threads, "out": out}
            launch({**job, "sequences": [asdict(s) for s in scored], "vocabulary": codec.size})
            rows: Float32 = np.load(out)
            return rows

        expected = None
        # The reference first: the others are compared with it.
        for spec in sorted(specs, key=lambda spec: spec.variant != reference):
            figures: dict[str, Any] = {}
            try:
                if reference:
                    rows = logits(spec)
                    if expected is None:
                        expected = rows
                    else:
                        figures["fidelity"] = fidelity(expected, rows, targets).as_dict()
                if not spec.peer:
                    plain = plain_answers(spec, requests, threads)
                    figures |= _adherence(examples, [answer["text"] for answer in plain])
                    ways = count_mismatches(model.manifest.prompt, spec, requests, plain, threads)
                    figures["differing"] = ways
            except (EdgeSlmError, ValueError) as error:
                figures["reason"] = str(error)
                if spec.variant == reference:
                    reference = ""
            qualities.append(
                Quality(model.name, spec.variant, spec.peer, reference, about, **figures)
            )
            done(spec.variant)
    order = [spec.variant for spec in specs]
    return sorted(qualities, key=lambda quality: order.index(quality.variant))


def _request(model: Model, codec: TextCodec, example: Example) -> Mapping[str, Any]:
    """`Request`'s arguments. An answer may have what the context has room for, and far more
    than was asked; a model that has learnt nothing never ends by itself."""
    words = count_words(example.response)
    prompt = codec.prompt(example.request, codec.form.check(example.command).commanded)
    room = model.manifest.model.positions - len(prompt)
    return {
        "request": example.request,
        "task": example.command.task,
        "words": words,
        "keep_length": False,
        "max_new_tokens": max(1, min(room, 4 * words + 32)),
    }


def _adherence(examples: Sequence[Example], texts: Sequence[str]) -> Mapping[str, Any]:
    asked = np.array([count_words(example.response) for example in examples], float)
    got = np.array([count_words(text) for text in texts], float)
    rank = spearman(asked, got)
    return {
        "words": tuple((int(a), int(g)) for a, g in zip(asked, got, strict=True)),
        "adherence": {
            "answers": len(got),
            "within": float(within_tolerance(asked, got).mean()),
            "mae": float(np.abs(asked - got).mean()),
            **({"spearman": rank} if np.isfinite(rank) else {}),  # of equal lengths there is none
        },
    }
