"""The advice keeps the limits, prefers the faithful, and nothing beats what it chose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm_bench.advice import (
    SAME,
    Limits,
    VariantRow,
    advise,
    deciding,
    faithfulness,
    thread_choices,
)
from edge_slm_runtime import read_manifest


def row(
    variant: str = "onnx-int8",
    threads: int = 1,
    latency: float = 20.0,
    memory: float = 90.0,
    disk: int = 12_000_000,
    faithful: bool | None = True,
    top1: float | None = 0.985,
) -> VariantRow:
    return VariantRow(
        variant=variant,
        engine="onnxruntime",
        precision="int8",
        threads=threads,
        disk_bytes=disk,
        top1=top1,
        faithful=faithful,
        load_ms=(100.0,),
        ttft_ms=(2.0,),
        tpot_ms=(0.4,),
        answers_ms={16: (latency / 2,), 32: (latency,), 64: (latency * 2,)},
        peak_rss_mb=(memory,),
    )


UNMEASURED = VariantRow("ctranslate2-int8", "ctranslate2", "int8", 1, 1, reason="not installed")

# Small numbers, so that rows are often equal in something.
rows = st.lists(
    st.builds(
        row,
        variant=st.sampled_from(["onnx-fp32", "onnx-int8", "onnx-int4"]),
        threads=st.sampled_from([1, 2, 4]),
        latency=st.sampled_from([10.0, 10.3, 10.6, 12.0, 20.0, 40.0]),
        memory=st.sampled_from([80.0, 90.0, 120.0]),
        disk=st.sampled_from([8_000_000, 12_000_000]),
        faithful=st.sampled_from([True, None, False]),
        top1=st.sampled_from([None, 0.9, 0.985, 1.0]),
    )
    | st.just(UNMEASURED),
    max_size=8,
)
limits = st.builds(
    Limits,
    st.none() | st.sampled_from([70.0, 85.0, 100.0]),
    st.none() | st.sampled_from([5.0, 10.5, 15.0]),
)


@given(rows, limits)
def test_it_fits_and_nothing_is_better(measured: list[VariantRow], allowed: Limits) -> None:
    advice = advise(measured, allowed)
    fitting = [r for r in measured if r.measured and not allowed.missed_by(r)]
    assert advice.line
    if advice.chosen is None:
        assert not fitting
        assert not advice.remarks
        return
    chosen = advice.chosen
    assert any(r is chosen for r in fitting)

    faith = {True: 2, None: 1, False: 0}
    rivals = [r for r in fitting if faith[r.faithful] >= faith[chosen.faithful]]
    assert all(r.faithful is chosen.faithful for r in rivals)
    assert chosen.latency_ms() <= min(r.latency_ms() for r in rivals) * SAME

    def costs(r: VariantRow) -> tuple[float, ...]:
        return (r.threads, r.memory_mb, r.disk_bytes, -(r.top1 or 0), r.latency_ms())

    for rival in rivals:
        pairs = list(zip(costs(rival), costs(chosen), strict=True))
        assert any(a > b for a, b in pairs) or all(a == b for a, b in pairs)


@given(rows, limits)
def test_limits_agree_with_their_excess(measured: list[VariantRow], allowed: Limits) -> None:
    for each in filter(lambda r: r.measured, measured):
        assert bool(allowed.missed_by(each)) == (allowed.excess(each) > 1)


def test_the_quickest_of_the_faithful() -> None:
    int8, int4 = row(latency=20), row("onnx-int4", latency=12, faithful=False, top1=0.92)
    advice = advise([int8, int4], Limits())
    assert advice.chosen is int8
    assert "32 words in 20.0 ms, 90 MB, top-1 98.5%" in advice.line
    assert advice.remarks == (
        "onnx-int4 on 1 thread is 1.67 times as quick, but outside its fidelity budget",
    )
    unknown = replace(int4, faithful=None)
    assert "of unknown fidelity" in advise([int8, unknown], Limits()).remarks[0]


def test_what_is_outside_the_budget_only_with_a_remark() -> None:
    big = row("onnx-fp32", memory=300, top1=1.0)
    accepted = row("onnx-int4", latency=25, faithful=False, top1=0.92)
    advice = advise([big, accepted], Limits(max_memory_mb=200))
    assert advice.chosen is accepted
    assert "the only one that fits" in advice.line
    assert "outside its fidelity budget" in advice.remarks[0]
    assert advice.remarks[1] == (
        "onnx-fp32 on 1 thread is 1.25 times as quick, but does not fit: 300 MB, allowed 200"
    )
    unknown = advise([replace(accepted, faithful=None, top1=None)], Limits())
    assert "does not say how faithful" in unknown.remarks[0]


def test_a_core_is_not_spent_on_a_few_percent() -> None:
    one, two = row(threads=1, latency=20.0), row(threads=2, latency=19.5)
    advice = advise([two, one], Limits())
    assert advice.chosen is one
    assert "within 5% of the quickest of 2" in advice.line
    assert advice.remarks == (
        "onnx-int8 on 2 threads is 1.03 times as quick: too little for what it costs",
    )
    assert advise([replace(two, answers_ms={32: (15.0,)}), one], Limits()).chosen.threads == 2  # type: ignore[union-attr]


def test_threads_of_each_variant_that_has_a_choice() -> None:
    measured = [
        *(row(threads=1, latency=20.9), row(threads=2, latency=20.0), row(threads=4, latency=30.0)),
        *(row("onnx-int4", 1, latency=22.0), row("onnx-int4", 2, latency=20.0)),
        *(row("onnx-fp32", 1), UNMEASURED),
    ]
    assert thread_choices(measured) == {"onnx-int8": 1, "onnx-int4": 2}


def test_when_nothing_fits_it_says_what_would() -> None:
    slow, large = row(latency=33.3, memory=80.0), row("onnx-fp32", latency=11.0, memory=123.4)
    advice = advise([slow, large, UNMEASURED], Limits(max_memory_mb=90, max_latency_ms=10))
    assert advice.chosen is None
    assert advice.line == (
        "nothing fits; the closest is onnx-fp32 on 1 thread (32 words in 11.0 ms, 123 MB, "
        "top-1 98.5%): --max-memory-mb 124 --max-latency-ms 11 admits it"
    )
    admitted = Limits(max_memory_mb=124, max_latency_ms=11)
    assert advise([slow, large], admitted).chosen is large
    assert advise([UNMEASURED], Limits()).line == "nothing could be measured"


def test_unsteady_samples_are_told() -> None:
    shaken = replace(row(), answers_ms={32: (10.0, 11.0, 30.0)})
    (remark,) = advise([shaken], Limits()).remarks
    assert remark == "unsteady: between 10.0 and 30.0 ms, the median decides"


def test_the_nearest_length_decides_where_32_words_do_not_fit() -> None:
    assert deciding([16, 32, 64]) == 32
    assert deciding([16]) == 16
    assert row().latency_ms() == row().latency_ms(32) == 20


def test_rows_are_json() -> None:
    data = json.loads(json.dumps(row().as_dict()))
    assert data["medians"]["answers_ms"] == {"16": 10, "32": 20, "64": 40}
    assert json.loads(json.dumps(UNMEASURED.as_dict()))["medians"] is None


def test_the_budget_is_that_of_the_bundle(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    fp32, int8 = (
        next(v for v in manifest.variants if v.name == n) for n in ("onnx-fp32", "onnx-int8")
    )
    assert faithfulness(manifest, fp32) is True  # the reference itself
    good, bad = ({"top1": t, "perplexity_ratio": 1.0} for t in (0.999, 0.5))
    assert faithfulness(manifest, replace(int8, fidelity=good)) is True
    assert faithfulness(manifest, replace(int8, fidelity=bad)) is False
    assert faithfulness(manifest, replace(int8, fidelity=None)) is None
    for provenance in ({}, {"gate": None}, {"gate": {"budgets": {"int8": 3}}}):
        other = replace(manifest, provenance=provenance)
        assert faithfulness(other, replace(int8, fidelity=good)) is None
        assert faithfulness(other, fp32) is True


@pytest.mark.parametrize("value", [99.94, 100.4])
def test_a_limit_just_missed_is_not_shown_as_kept(value: float) -> None:
    (missed,) = Limits(max_memory_mb=value - 0.01).missed_by(row(memory=value))
    assert missed.endswith(f"allowed {value - 0.01:g}")
