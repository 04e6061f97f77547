"""The bundle that comes with the package, and the checkpoint that it was made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edge_slm
from edge_slm.cli.demo import REFERENCE
from edge_slm_runtime import verify

SIZE_LIMIT = 30_000_000  # bytes, of the checkpoint in the repository


@pytest.fixture(scope="module", params=["onnxruntime", "numba"])
def slm(request: pytest.FixtureRequest) -> edge_slm.SLM:
    return edge_slm.load(engine=request.param, threads=1)


def test_it_is_int8_and_small() -> None:
    manifest = verify(edge_slm.shipped_bundle())
    assert [v.name for v in manifest.variants] == ["onnx-int8", "numba-int8"]
    assert sum(entry.size for entry in manifest.files.values()) < 28_000_000
    assert all(variant.fidelity for variant in manifest.variants)
    assert manifest.provenance["gate"]["accepted"] == []


def test_it_was_made_of_the_committed_checkpoint() -> None:
    manifest = verify(edge_slm.shipped_bundle())
    recipe = json.loads((REFERENCE / "recipe.json").read_text("utf-8"))
    assert manifest.provenance["recipe"]["digest"] == recipe["digest"]
    assert sum(f.stat().st_size for f in REFERENCE.iterdir()) < SIZE_LIMIT


@pytest.mark.parametrize(
    ("task", "request_text", "words"),
    [
        ("image", "a red fox in the snow", 12),
        ("image", "a red fox in the snow", 48),
        ("video", "a fox crossing a frozen river", 80),
        ("scene", "dog, ball, park", 10),
        ("tags", "Lighthouse at Dusk (oil paint on canvas)", 6),
    ],
)
def test_it_keeps_the_length_and_is_about_the_request(
    slm: edge_slm.SLM, task: str, request_text: str, words: int
) -> None:
    out = slm.generate(request_text, task=task, words=words, relevance=9)
    assert out.in_tolerance
    assert out.achieved.words == out.words == len(out.text.split())
    if task in ("image", "video"):
        assert "fox" in out.text


def test_the_task_shapes_the_text(slm: edge_slm.SLM) -> None:
    def commas(task: str, words: int) -> float:
        out = slm.generate("a fox crossing a frozen river", task=task, words=words, relevance=9)
        return out.text.count(",") / out.words

    assert commas("tags", 8) > 3 * commas("video", 40)


def test_goldens_of_the_same_package_versions_match(slm: edge_slm.SLM) -> None:
    """Greedy token ids, exactly; int8 may differ on another onnxruntime or CPU family,
    so there most of the text must agree."""
    goldens = slm.manifest.goldens
    assert goldens
    agree = total = 0
    for golden in goldens:
        got = slm.greedy_ids(golden.request, golden.command, golden.max_new_tokens)
        want = golden.ids[slm.variant.name]
        agree += sum(a == b for a, b in zip(got, want, strict=False))
        total += len(want)
    assert agree / total > 0.6


def test_the_card_names_its_data() -> None:
    card = (REFERENCE / "README.md").read_text("utf-8")
    notice = (Path(edge_slm.__file__).parents[1] / "NOTICE").read_text("utf-8")
    for source in ("UniGenBench", "imageinwords", "VBench", "CommonGen", "tategallery"):
        assert source in card
        assert source in notice
