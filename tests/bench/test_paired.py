"""Ratios to a kernel: what they are made of, and that a slower machine leaves them alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm_bench.machine import machine
from edge_slm_bench.paired import (
    LEAST_ROUNDS,
    Baseline,
    Beside,
    Ratio,
    Turns,
    compute_kernel,
    cpu_name,
    interpreter_kernel,
    median_interval,
    memory_kernel,
    ratio_of,
    seconds_of,
    table,
)
from edge_slm_runtime.errors import DataError

REPOSITORY = Path(__file__).parents[2]
seconds = st.floats(1e-7, 10)
times = st.lists(seconds, min_size=1, max_size=60)


@given(times, st.floats(0.01, 100))
def test_a_machine_of_another_speed_gives_the_same_ratio(calls: list[float], speed: float) -> None:
    kernel = [2e-3] * (len(calls) + 1)
    here = ratio_of(calls, kernel)
    there = ratio_of([t * speed for t in calls], [t * speed for t in kernel])
    assert there.ratio == pytest.approx(here.ratio)
    assert (there.low, there.high) == pytest.approx((here.low, here.high))
    assert here.low <= here.ratio <= here.high
    assert here.kernel_ms == pytest.approx(2)


def test_drift_in_the_middle_of_a_run_cancels_out() -> None:
    speed = [1 + 3 * i / 40 for i in range(41)]  # the kernel gets four times slower
    calls = [2 * (a + b) / 2 for a, b in pairwise(speed)]
    found = ratio_of(calls, speed)
    assert (found.ratio, found.low, found.high) == pytest.approx((2, 2, 2))


def test_some_disturbed_rounds_do_not_move_the_figure() -> None:
    calls = [1.0] * 20 + [50.0] * 4
    found = ratio_of(calls, [0.5] * 25)
    assert found == Ratio(2, 2, 2, 24, 500)
    with pytest.raises(ValueError, match="zip"):
        ratio_of(calls, [0.5] * 24)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_the_interval_is_around_the_median(values: list[float]) -> None:
    low, high = median_interval(values)
    ordered = sorted(values)
    middle = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
    assert low <= middle[0] <= middle[1] <= high
    assert {low, high} <= set(values)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, high = median_interval([draw.expovariate(1) for _ in range(15)])
        hits += low <= 0.6931 <= high
    assert 0.95 <= hits / 2000 <= 0.98  # exactly 0.9648 for n = 15, k = 4
    assert median_interval([3.0, 1.0, 2.0]) == (1, 3)
    assert median_interval([float(i) for i in range(5000)])[0] > 2400


@given(seconds, seconds, seconds)
def test_both_sides_of_a_round_take_about_as_long(
    budget: float, call: float, kernel: float
) -> None:
    turns = Turns.within(budget, call, kernel, LEAST_ROUNDS)
    assert turns.rounds >= LEAST_ROUNDS
    assert 1 in (turns.calls, turns.kernel_runs)
    assert 0.6 < turns.calls * call / (turns.kernel_runs * kernel) < 1.6
    per_round = turns.calls * call + turns.kernel_runs * kernel
    assert turns.rounds * per_round < budget + (LEAST_ROUNDS + 1) * per_round


@pytest.mark.parametrize("make", [compute_kernel, memory_kernel, interpreter_kernel])
def test_kernels_run(make: object) -> None:
    kernel = make()  # type: ignore[operator]
    beside = Beside(kernel, runs=2)
    beside()
    beside()
    assert len(beside.seconds) == 2
    assert min(*beside.seconds, seconds_of(kernel, 1e-4)) > 0


def test_only_what_is_slower_by_all_its_spread_exceeds() -> None:
    assert Ratio(2.0, 1.9, 2.1, 20, 3.0).exceeds(1.5, 1.25)
    assert not Ratio(2.0, 1.7, 2.1, 20, 3.0).exceeds(1.5, 1.25)
    assert not Ratio(1.0, 0.9, 1.1, 20, 3.0).exceeds(1.5, 1.25)


def test_baselines_are_kept_per_cpu(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    one = Baseline(file, "one")
    assert not one.ratios
    one.save({"load": Ratio(2.0, 1.9, 2.1, 9, 3.0), "step": Ratio(1 / 3, 0.3, 0.4, 9, 3.0)})
    Baseline(file, "two").save({"load": Ratio(5.0, 4.0, 6.0, 9, 3.0)})
    Baseline(file, "one").save({"load": Ratio(4.0, 3.0, 5.0, 9, 3.0)})
    assert json.loads(file.read_text("utf-8")) == {
        "one": {"load": 4.0, "step": 0.3333},
        "two": {"load": 5.0},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["baseline.json"]
    for broken in ("{", "[]", '{"one": 1}', '{"one": {"load": "fast"}}'):
        file.write_text(broken, "utf-8")
        with pytest.raises(DataError, match="holds no baselines"):
            Baseline(file, "one")


def test_the_table_says_how_far_from_the_baseline() -> None:
    measured = {
        "load": (0.08, Ratio(24.0, 23.0, 25.0, 9, 3.0)),
        "a new benchmark": (1e-5, Ratio(0.003, 0.002, 0.004, 99, 3.0)),
    }
    head, load, new = table(measured, {"load": 20.0, "gone": 1.0})
    assert head.split()[0] == "benchmark"
    assert load.split() == "load 80.000 ms 24 [23, 25] 20 +20%".split()
    assert new.endswith("–       –")
    assert len({len(head), len(load), len(new)}) == 1


@pytest.mark.slow
def test_benchmarks_against_a_baseline(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        quick = ("--benchmark-max-time=0.02", "--benchmark-quiet", "-p", "no:xdist")
        chosen = ("bench/benchmarks", "-k", "greedy-6144", f"--baseline={file}")
        return subprocess.run(
            [sys.executable, "-m", "pytest", *chosen, *quick, *options],
            cwd=REPOSITORY,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            capture_output=True,
            text=True,
            check=False,
        )

    cpu, name = cpu_name(machine()), "test_sampler_32_tokens[greedy-6144]"
    first = run("--save-baseline", f"--benchmark-json={tmp_path / 'all.json'}")
    assert first.returncode == 0, first.stdout
    assert f"no baseline for {cpu}" in first.stdout
    (saved,) = json.loads(file.read_text("utf-8"))[cpu].items()
    assert saved[0] == name
    (told,) = json.loads((tmp_path / "all.json").read_text("utf-8"))["benchmarks"]
    assert told["extra_info"]["ratio"] == pytest.approx(saved[1], rel=1e-3)
    assert told["stats"]["rounds"] == told["extra_info"]["pairs"] >= LEAST_ROUNDS

    file.write_text(json.dumps({cpu: {name: saved[1] / 100}}), "utf-8")
    slower = run("--fail-above=1.25")
    assert slower.returncode == 1
    assert "times the kernel" in slower.stdout
    assert run().returncode == 0  # without the option it is told, not failed
    file.write_text(json.dumps({cpu: {name: saved[1] * 100}}), "utf-8")
    assert run("--fail-above=1.25").returncode == 0
