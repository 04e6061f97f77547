"""The gate's other half: a variant that obeys less than fp32 is told apart from noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm_converters import Example, adherence, convert, gate
from edge_slm_converters.adherence import Answers
from edge_slm_converters.arrays import Float64
from edge_slm_converters.checkpoint import read_checkpoint
from edge_slm_runtime.bundle import Variant
from edge_slm_runtime.command import Command


def answers(**values: Sequence[float]) -> Answers:
    arrays = {name: np.array(v, float) for name, v in values.items()}
    count = len(next(iter(arrays.values())))
    return Answers(arrays, np.full(count, math.nan), [str(i) for i in range(count)])


def test_as_good_as_fp32_has_no_faults() -> None:
    within = answers(within=[1, 0] * 40, length_mae=[0, 3] * 40)
    assert adherence.faults(within, within) == []


@pytest.mark.parametrize(
    ("figure", "before", "after"),
    [("within", 0.9, 0.6), ("task_accuracy", 1.0, 0.8), ("relevance", 0.5, 0.4)],
)
def test_clearly_worse_is_told_with_both_means(figure: str, before: float, after: float) -> None:
    few = np.linspace(0, 1, 200, endpoint=False)
    (told,) = adherence.faults(
        answers(**{figure: (few < before).astype(float)}),
        answers(**{figure: (few < after).astype(float)}),
    )
    assert told.startswith(f"{figure} {after:.3f} against {before:.3f}")


def test_longer_errors_are_worse_and_shorter_ones_are_not() -> None:
    near, far = answers(length_mae=[1.0] * 50), answers(length_mae=[4.0] * 50)
    assert adherence.faults(near, far)
    assert adherence.faults(far, near) == []


def test_a_difference_that_chance_explains_is_no_fault() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random((2, 20)) < 0.7
    assert adherence.faults(answers(within=before), answers(within=after)) == []
    assert adherence.faults(answers(within=[1]), answers(within=[0])) == []


def test_answers_to_one_request_count_once() -> None:
    """Ten answers to each of six requests, all of two of them lost: six facts, not sixty."""
    before, after = np.ones(60), np.repeat([1.0, 1, 1, 1, 0, 0], 10)
    alone, levels = [str(i) for i in range(60)], np.full(60, math.nan)
    of_six = [str(i // 10) for i in range(60)]
    for requests, count in ((alone, 1), (of_six, 0)):
        reference = Answers({"within": before}, levels, requests)
        assert (
            len(adherence.faults(reference, Answers({"within": after}, levels, requests))) == count
        )


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30), st.floats(0, 0.0199))
def test_within_what_is_allowed_is_never_refused(values: list[float], lost: float) -> None:
    before = answers(relevance=values)
    assert adherence.faults(before, answers(relevance=[v - lost for v in values])) == []


def test_figures_are_means_and_levels() -> None:
    values = {"relevance": np.array([0.1, 0.3, 0.8]), "task_accuracy": np.full(3, math.nan)}
    found = Answers(values, np.array([math.nan, 0, 9]), ["a", "b", "b"]).figures()
    assert found == {
        "answers": 3.0,
        "relevance": pytest.approx(0.4),
        "relevance_0": 0.3,
        "relevance_9": 0.8,
    }


def test_every_level_is_asked_and_only_what_fits(tiny_checkpoint: Path) -> None:
    source = read_checkpoint(tiny_checkpoint)
    levels = len(source.form.grammar.axis("relevance").values)
    task = source.form.grammar.tasks[0]
    asked = [("a cabin", Command(task, 12)), ("x" * 900, Command(task))]
    found = adherence.requests(source, asked, levelled=True)
    assert [r.relevance for r in found] == [None, *range(levels)]
    assert {r.request for r in found} == {"a cabin"}
    assert all(r.max_new_tokens and not r.keep_length for r in found)
    assert len(adherence.requests(source, asked, levelled=False)) == 1  # nobody would judge


class SharedWords:
    """A judge that counts."""

    def relevance(self, requests: Sequence[str], texts: Sequence[str]) -> Float64:
        pairs = zip(requests, texts, strict=True)
        return np.array([float(bool(set(r.split()) & set(t.split()))) for r, t in pairs])

    def of_task(self, tasks: Sequence[str], texts: Sequence[str]) -> Float64:
        return np.array([float(task == "image") for task in tasks])


def test_the_manifest_says_how_each_variant_obeys(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = "warm light in the windows, soft evening sky"
    examples = [Example("a cabin", Command(task, 12), text) for task in ("image", "video")]
    names = ("onnx-fp32", "onnx-int8")
    manifest = convert(
        tiny_checkpoint,
        tmp_path / "b",
        names,
        accept=True,
        evaluation=examples,
        judge=SharedWords(),
    )
    levels = manifest.prompt.grammar.levels
    for variant in manifest.variants:
        figures = variant.adherence
        assert figures is not None
        assert figures["answers"] == 2 + 2 * levels
        assert figures["task_accuracy"] == 0.5
        assert {f"relevance_{level}" for level in range(levels)} < set(figures)
        assert figures["length_mae"] > 0
    assert manifest.provenance["gate"]["adherence"] == adherence.ALLOWED


def test_without_a_judge_lengths_are_counted(tiny_bundle: Path) -> None:
    from edge_slm_runtime import read_manifest

    for variant in read_manifest(tiny_bundle).variants:
        assert variant.adherence is not None
        assert set(variant.adherence) == {"answers", "within", "length_mae"}


def test_disobedience_is_refused_beside_fidelity() -> None:
    variant = Variant("onnx-int8", "onnxruntime", "int8", "onnx-int8", 1, 1)
    assert gate.refusals([variant]) == {}
    told = gate.refusals([variant], {"onnx-int8": ["within 0.2 against 0.9"]})
    assert told == {"onnx-int8": "onnx-int8: within 0.2 against 0.9"}
