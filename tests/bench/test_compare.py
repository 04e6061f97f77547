from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_report import disturbed, make_report, measured, without
from rich.console import Console

from edge_slm_bench.compare import compare, show
from edge_slm_bench.ratios import _medians, ratio_interval, student
from edge_slm_bench.results import FIGURES, Cell, CellResult, ProcessSample, Report, Timing
from edge_slm_runtime.errors import DataError

CELL = Cell("m", "onnx-int8", 2, "single-stream", 16, 4)
TOLERANCE = 0.1


def result(
    slow: float = 1, cell: Cell = CELL, processes: int = 5, noise: float = 0.01, seed: int = 0
) -> CellResult:
    """Processes of three requests of some ms, all times `slow` times as long."""
    random = np.random.default_rng(seed)
    samples = []
    for number in range(processes):
        luck = slow * (1 + noise * random.uniform(-1, 1))
        steps = 3 * luck * (1 + noise * random.uniform(-1, 1, (3, 3)))
        timings = tuple(
            Timing(10 * luck + float(row.sum()), 4, 10 * luck, tuple(map(float, row)))
            for row in steps
        )
        samples.append(
            ProcessSample(
                number, 100 * luck, False, timings, sum(t.total_ms for t in timings) / 1e3, 90
            )
        )
    return CellResult(cell, "onnxruntime", "int8", False, 1, 1, "ok", "", tuple(samples))


def report(*cells: CellResult, **facts: object) -> Report:
    models = {name: {"digest": "d"} for name in {c.cell.model for c in cells}}
    plain = Report("edge-slm bench", "2026-01-31", {"cpu": "c"}, {}, models, cells)
    return replace(plain, **facts)  # type: ignore[arg-type]


def said(before: Report, after: Report) -> str:
    out = io.StringIO()
    show(compare(before, after, TOLERANCE), Console(file=out, width=200))
    return out.getvalue()


# -- the promise ----------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    processes=st.integers(1, 8),
    noise=st.floats(0, 0.5),
    tolerance=st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_a_report_is_never_worse_than_itself(
    seed: int, processes: int, noise: float, tolerance: float
) -> None:
    same = report(result(processes=processes, noise=noise, seed=seed))
    found = compare(same, same, tolerance)
    assert found.changes
    assert not found.regressions
    assert all(c.ratio == 1 and c.verdict == "same" for c in found.changes)
    assert found.drift == 1


@given(
    seed=st.integers(0, 1000),
    processes=st.integers(1, 8),
    tolerance=st.floats(0.02, 1),
    beyond=st.floats(1.02, 5),
)
@settings(max_examples=40, deadline=None)
def test_slower_by_more_than_the_tolerance_is_always_found(
    seed: int, processes: int, tolerance: float, beyond: float
) -> None:
    slow = (1 + tolerance * (1 if processes > 2 else 2)) * beyond
    before, after = (report(result(f, processes=processes, noise=0, seed=seed)) for f in (1, slow))
    found = compare(before, after, tolerance)
    names = {c.figure for c in found.regressions}  # type: ignore[union-attr]
    assert names == set(FIGURES) - {"peak_rss_mb"}
    assert all(c.verdict == "slower" for c in found.changes if c.figure != "peak_rss_mb")
    back = compare(after, before, tolerance)
    assert not back.regressions
    assert all(c.verdict == "faster" for c in back.changes if c.figure != "peak_rss_mb")


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_noise_within_the_tolerance_is_no_regression(seed: int) -> None:
    before, after = report(result(noise=0.03, seed=seed)), report(result(noise=0.03, seed=seed + 1))
    assert not compare(before, after, TOLERANCE).regressions


def test_a_change_that_the_spread_explains_is_unsure() -> None:
    one, wide = result(noise=0.01), result(1.3, noise=0.6, seed=3)
    found = compare(report(one), report(wide), TOLERANCE)
    tpot = next(c for c in found.changes if c.figure == "tpot_ms")
    assert tpot.worse > 1 + TOLERANCE
    assert tpot.low is not None
    assert tpot.low < 1 < (tpot.high or 0)
    assert tpot.verdict == "unsure"
    assert not tpot.regression


def test_few_processes_need_twice_the_tolerance() -> None:
    before = report(result(processes=2))
    assert not compare(before, report(result(1.15, processes=2)), TOLERANCE).regressions
    found = compare(before, report(result(1.25, processes=2)), TOLERANCE)
    assert found.regressions
    assert any("fewer than 3 processes" in note for note in found.notes)
    assert all(c.low is None for c in found.changes)


def test_more_memory_is_a_regression() -> None:
    fat = result()
    fat = replace(fat, samples=tuple(replace(s, peak_rss_mb=120) for s in fat.samples))
    found = compare(report(result()), report(fat), TOLERANCE)
    assert [c.verdict for c in found.regressions] == ["more memory"]  # type: ignore[union-attr]


# -- matching ---------------------------------------------------------------------


def test_halved_threads_are_compared_and_caught() -> None:
    half = result(1.8, replace(CELL, threads=1))
    found = compare(report(result()), report(half), TOLERANCE)
    assert found.regressions
    assert found.notes[0] == "no cell has the same threads in both: 2 and 1 threads are compared"
    assert not found.only_before


def test_threads_are_kept_apart_where_some_match() -> None:
    one = replace(CELL, threads=1)
    found = compare(
        report(result(), result(1.8, one)),
        report(result(seed=1), result(9, replace(CELL, batch=2))),
        TOLERANCE,
    )
    assert not found.regressions
    assert found.only_before == ("m onnx-int8, 1 thread, 16→4 tokens",)
    assert len(found.only_after) == 1


def test_a_cell_that_breaks_is_a_regression() -> None:
    other = replace(CELL, variant="onnx-int4")
    before = report(result(), result(cell=other))
    broken = without(result(cell=other), "failed", "killed by SIGKILL")
    found = compare(before, report(result(), broken), TOLERANCE)
    (regression,) = found.regressions
    assert regression.line == (
        "m onnx-int4, 2 threads, 16→4 tokens: failed, was measured before: killed by SIGKILL"
    )
    # Skipped is a choice, and what failed before cannot break.
    skipped = without(result(cell=other), "skipped", "not installed")
    found = compare(before, report(result(), skipped), TOLERANCE)
    assert not found.regressions
    assert found.only_before == ("m onnx-int4, 2 threads, 16→4 tokens",)
    assert not compare(report(result(), broken), before, TOLERANCE).regressions


@pytest.mark.parametrize("side", [0, 1])
def test_disturbed_cells_are_shown_and_never_fail(side: int) -> None:
    cells = [result(), result(3)]
    cells[side] = disturbed(cells[side])
    found = compare(report(cells[0]), report(cells[1]), TOLERANCE)
    assert {c.verdict for c in found.changes} == {"disturbed"}
    assert not found.regressions
    assert found.drift is None
    assert "every cell was disturbed: no speed was held against the tolerance" in found.notes


def test_disturbed_processes_do_not_count_beside_others() -> None:
    slow = result(3)
    flagged = tuple(replace(s, flags=("busy",)) for s in slow.samples)
    mixed = result()
    mixed = replace(mixed, samples=(*mixed.samples, *flagged))
    assert not compare(report(result()), report(mixed), TOLERANCE).regressions


def test_reports_without_anything_in_common_are_refused() -> None:
    other = report(result(cell=replace(CELL, variant="x")))
    with pytest.raises(DataError, match="nothing in common"):
        compare(report(result()), other, TOLERANCE)


# -- quality, notes, drift ----------------------------------------------------------


def with_quality(report: Report, **changed: float) -> Report:
    first, *rest = report.quality
    fidelity = {**(first.fidelity or {}), **{k: v for k, v in changed.items() if k != "within"}}
    adherence = {**(first.adherence or {}), **{k: v for k, v in changed.items() if k == "within"}}
    first = replace(first, fidelity=fidelity, adherence=adherence)
    return replace(report, quality=(first, *rest))


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"top1": 0.85}, "less faithful"),
        ({"kl_mean": 0.5}, "less faithful"),
        ({"kl_mean": 2e-9}, None),  # more than before, and nothing
        ({"within": 0.4}, "less obedient"),
        ({"top1": 0.97, "within": 0.88}, None),
    ],
)
def test_fidelity_and_adherence_count(changed: dict[str, float], verdict: str | None) -> None:
    made = make_report()
    few = replace(made, cells=made.cells[:1])
    found = compare(few, with_quality(few, **changed), TOLERANCE).regressions
    assert [c.verdict for c in found] == ([verdict] if verdict else [])  # type: ignore[union-attr]


def test_quality_is_compared_on_the_same_texts_alone() -> None:
    made = make_report()
    few = replace(made, cells=made.cells[:1], quality=made.quality[:1])
    other = replace(few.quality[0], evaluation="other texts", fidelity=None)
    found = compare(few, replace(few, quality=(other,)), TOLERANCE)
    assert not found.regressions
    assert any("quality not compared" in note for note in found.notes)
    broken = replace(few.quality[0], reason="killed", fidelity=None)
    found = compare(few, replace(few, quality=(broken,)), TOLERANCE)
    assert [r.line for r in found.regressions] == [
        "random-98m onnx-fp32: failed, was measured before: killed"
    ]


def test_what_changed_beside_the_code_is_said() -> None:
    before = report(result(), machine={"cpu": "a", "packages": {"onnxruntime": "1.30", "x": "1"}})
    after = report(
        result(seed=1),
        machine={"cpu": "b", "packages": {"onnxruntime": "1.31", "x": "1"}},
        models={"m": {"digest": "other"}},
    )
    notes = compare(before, after, TOLERANCE).notes
    assert "another machine: cpu a → b" in notes
    assert "onnxruntime 1.30 → 1.31" in notes
    assert "m: another bundle than before, its digest changed" in notes
    assert len(notes) == 3


def test_a_machine_that_is_slower_as_a_whole_is_named() -> None:
    cells = [replace(CELL, prompt_tokens=n) for n in (16, 32, 64)]
    before = report(*(result(cell=cell) for cell in cells))
    after = report(*(result(1.07, cell) for cell in cells))
    text = said(before, after)
    assert "median over all speeds: 1.07× the time of before: the machine" in text
    assert "no regressions beyond 10%" in text
    assert "not the code" not in said(before, before)


def test_it_is_shown_and_json_ready() -> None:
    before, after = make_report(), make_report(1)
    cells = [without(r, "failed", "gone") if i == 3 else r for i, r in enumerate(after.cells)]
    after = replace(after, cells=tuple(cells))
    found = compare(before, after, TOLERANCE)
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert len(data["regressions"]) == len(found.regressions)
    assert data["broken"][0]["reason"] == "gone"
    for width in (80, 200):
        out = io.StringIO()
        show(found, Console(file=out, width=width, force_terminal=True, color_system=None))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert any("regression" in line and "beyond 10%" in line for line in lines)
    assert "†" in out.getvalue()
    assert measured(before.cells[0].cell).cell in {r.cell for r in before.cells}


# -- the interval -------------------------------------------------------------------


def test_weighted_medians_are_those_of_the_drawn_processes() -> None:
    random = np.random.default_rng(5)
    processes = [list(random.uniform(1, 2, n)) for n in (1, 4, 2, 7)]
    draws = np.random.default_rng(9).integers(4, size=(1000, 4))
    expected = [np.median(np.concatenate([processes[i] for i in row])) for row in draws]
    np.testing.assert_allclose(_medians(processes, 9), expected)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        sides = [
            [list(random.lognormal(luck, 0.05, 3)) for luck in random.normal(0, 0.1, 5)]
            for _ in range(2)
        ]
        low, high = ratio_interval(*sides) or (np.nan, np.nan)
        held += low <= 1 <= high
    assert held >= 186  # 93% of 200: the plain bootstrap has less


def test_students_quantiles() -> None:
    for freedom, exact in ((3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert student(freedom) == pytest.approx(exact, rel=0.015)


# -- peers as the control -------------------------------------------------------


@pytest.mark.parametrize(("ours", "found"), [(1.3, False), (1.9, True)])
def test_what_the_peers_lost_too_is_the_machine(ours: float, found: bool) -> None:
    peer = replace(result(cell=replace(CELL, variant="llama.cpp-Q8_0")), peer=True)
    slower = replace(result(1.3, cell=peer.cell), peer=True)
    compared = compare(report(result(), peer), report(result(ours), slower), TOLERANCE)
    assert bool(compared.regressions) == found
    assert all(c.cell["variant"] == "onnx-int8" for c in compared.regressions)  # type: ignore[union-attr]
    assert any("1.30× the time of before" in note for note in compared.notes)
    # Without them nothing tells the machine from the code.
    assert compare(report(result()), report(result(ours)), TOLERANCE).regressions
