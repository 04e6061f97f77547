"""The rule that gives each matrix its bits, and the forward pass that it is measured with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edge_slm_runtime
from edge_slm_bench.examples import Scored
from edge_slm_converters import gguf
from edge_slm_converters.calibration import ForwardPass
from edge_slm_converters.checkpoint import GPT2Config, parse_config, read_checkpoint
from edge_slm_converters.gptq import loss
from edge_slm_converters.mixed import FORMS, Form, choose, costs, int4, quantised
from edge_slm_converters.quantise import step_bytes

from .conftest import IDS, Original

TEXTS = [Scored(tuple(IDS[start : start + 30]), 9) for start in range(0, 31, 6)]
BITS_8 = Form(None)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-4),
        ({"activation_function": "gelu"}, 5e-3),  # computed as its tanh approximation
        ({"activation_function": "relu"}, 1e-4),
        ({"activation_function": "silu"}, 1e-4),
        ({"activation_function": "tanh"}, 1e-4),
        ({"tie_word_embeddings": False, "n_inner": 72, "layer_norm_epsilon": 0.05}, 1e-4),
        ({"scale_attn_by_inverse_layer_idx": True}, 1e-4),
    ],
)
def test_forward_pass_is_transformers(
    original: Callable[..., Original], settings: dict[str, object], tolerance: float
) -> None:
    model = original(**settings)
    source = read_checkpoint(model.path)
    ids = tuple(IDS)
    texts = [Scored(ids[:20], 5), Scored(ids, 1)]  # one text does not see the other
    forward = ForwardPass(source.config, source.tensors, texts)
    x = forward.embedded()
    for i in range(source.config.layers):
        x = forward.layer(i, x, lambda name, x: source.tensors[f"{name}.weight"])
    logits = forward.logits(x, source.head)
    expected = np.concatenate([model.logits[4:19], model.logits[:-1]])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)


def shape(layers: int = 2, width: int = 256) -> GPT2Config:
    return parse_config(
        {
            "model_type": "gpt2",
            "n_layer": layers,
            "n_head": 4,
            "n_embd": width,
            "vocab_size": 417,
            "n_positions": 96,
            "layer_norm_epsilon": 1e-5,
        }
    )


def stored(config: GPT2Config, forms: dict[str, Form]) -> int:
    return sum(forms[name].bytes(*size) for name, size in config.matrices().items())


def test_bits_go_where_they_gain_most() -> None:
    config = shape()
    even = dict.fromkeys(config.matrices(), (0.4, 0.39, 0.38, 0.01))
    least = stored(config, dict.fromkeys(even, FORMS[0]))
    assert set(choose(even, config, least).values()) == {FORMS[0]}
    assert set(choose(even, config, 0).values()) == {FORMS[0]}  # nothing is smaller
    assert set(choose(even, config, 10**9).values()) == {BITS_8}

    uneven = even | {"h.1.mlp.c_fc": (40.0, 39.0, 38.0, 1.0)}
    most = least + BITS_8.bytes(256, 1024) - FORMS[0].bytes(256, 1024)
    found = choose(uneven, config, most)
    assert found["h.1.mlp.c_fc"] == BITS_8
    assert set(found.values()) == {FORMS[0], BITS_8}
    for limit in range(least, least + 400_000, 50_000):
        assert stored(config, choose(uneven, config, limit)) <= limit


def test_what_costs_nothing_gets_nothing() -> None:
    config = shape()
    free = dict.fromkeys(config.matrices(), (0.0, 0.0, 0.0, 0.0))
    assert set(choose(free, config, 10**9).values()) == {FORMS[0]}


def test_padding_is_not_taken_for_small() -> None:
    """72 inputs fill 128 places of one block, so blocks of 32 are the smaller form."""
    config = shape(1, 72)
    free = dict.fromkeys(config.matrices(), (0.0, 0.0, 0.0, 0.0))
    assert choose(free, config, 0)["h.0.attn.c_proj"] == Form(32)


def test_at_98m_the_limit_leaves_room_for_a_tenth_in_8_bits() -> None:
    config = shape(12, 768)
    head = config.width * config.vocab_size
    limit = gguf.step_bytes(config, "Q4_0") - head - 4 * config.vocab_size
    first = {name: (9.0, 8.0, 7.0, 0.1) for name in config.matrices() if name.startswith("h.0.")}
    measured = dict.fromkeys(config.matrices(), (1.0, 0.9, 0.8, 0.01)) | first
    found = choose(measured, config, limit)
    assert limit - 300_000 < stored(config, found) <= limit
    assert BITS_8 in found.values()
    assert {name[:4] for name, form in found.items() if form == BITS_8} == {"h.0."}


def test_costs_are_those_of_one_matrix_alone(tiny_checkpoint: Path) -> None:
    source = read_checkpoint(tiny_checkpoint)
    measured = costs(source, TEXTS)
    assert list(measured) == list(source.config.matrices())
    for name, cost in measured.items():
        assert all(c > 0 for c in cost), name
        assert cost[FORMS.index(BITS_8)] < min(cost[:-1]) / 20
        assert cost[2] < cost[1]  # blocks of 32 against blocks of 64
    silent = dict(source.tensors) | {"h.1.mlp.c_proj.weight": np.zeros((256, 64), np.float32)}
    found = costs(type(source)(**{**_fields(source), "tensors": silent}), TEXTS)
    assert set(found["h.1.mlp.c_proj"]) == {0.0}


def _fields(source: object) -> dict[str, object]:
    return {name: getattr(source, name) for name in type(source).__slots__}  # type: ignore[attr-defined]


def test_later_layers_see_what_earlier_ones_have_become(tiny_checkpoint: Path) -> None:
    """The inputs of the last matrix are those behind quantised layers, and GPTQ on them
    loses less than GPTQ on the float32 ones."""
    source = read_checkpoint(tiny_checkpoint)
    forms = dict.fromkeys(source.config.matrices(), Form(32))
    blocks = quantised(source, TEXTS, forms)
    assert set(blocks) == set(forms)
    seen = {}

    def matrix_of(name: str, x: np.ndarray) -> np.ndarray:
        seen[name] = x.T @ x / np.float32(len(x))
        return blocks[name].matrix()

    forward = ForwardPass(source.config, source.tensors, TEXTS)
    x = forward.embedded()
    for i in range(source.config.layers):
        x = forward.layer(i, x, matrix_of)
    name = "h.1.mlp.c_proj"
    weight = source.tensors[f"{name}.weight"]
    alone = quantised(source, TEXTS, forms | dict.fromkeys(list(forms)[:-1], BITS_8))[name]
    ours, theirs = (loss(weight, b.matrix(), seen[name]) for b in (blocks[name], alone))
    assert ours < theirs


def test_the_manifest_says_what_was_chosen(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    source = read_checkpoint(tiny_checkpoint)
    manifest = edge_slm_runtime.read_manifest(tiny_bundle)
    record = manifest.provenance["quantisation"]["onnx-int4"]
    assert record["method"] == "gptq"
    assert record["texts"] > 50
    assert list(record["matrices"]) == list(source.config.matrices())
    for chosen in record["matrices"].values():
        assert chosen["bits"] == (4 if chosen["block"] else 8)
        assert chosen["kl"] >= 0
    variant = next(v for v in manifest.variants if v.name == "onnx-int4")
    precision, again = int4(source, TEXTS)
    assert set(again["matrices"]) == set(record["matrices"])
    limit = gguf.step_bytes(source.config, "Q4_0")
    assert variant.weight_bytes_per_token <= limit
    assert step_bytes(source.config, precision) <= limit
