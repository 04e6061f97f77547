"""The fixture that times code beside a reference kernel, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_slm_bench.machine import machine
from edge_slm_bench.paired import (
    LEAST_ROUNDS,
    Baseline,
    Beside,
    Kernel,
    Paired,
    Ratio,
    Turns,
    cpu_name,
    ratio_of,
    seconds_of,
    table,
)
from edge_slm_runtime.errors import DataError

MEASURED = pytest.StashKey[dict[str, tuple[float, Ratio]]]()
BASELINE = pytest.StashKey[Baseline]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hot paths")
    group.addoption(
        "--baseline",
        type=Path,
        default=Path(__file__).with_name("baseline.json"),
        help="The file of saved ratios.",
    )
    group.addoption(
        "--save-baseline", action="store_true", help="Write the ratios of this run to it."
    )
    group.addoption(
        "--fail-above",
        type=float,
        metavar="FACTOR",
        help="Fail a benchmark whose ratio is above FACTOR times its baseline, e.g. 1.25, "
        "even at the low end of its spread.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}
    try:
        config.stash[BASELINE] = Baseline(config.getoption("--baseline"), cpu_name(machine()))
    except DataError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture
def paired(benchmark: Any, request: pytest.FixtureRequest) -> Paired:
    """`paired(call, kernel)`: times both in turn; the ratio and its spread go to the
    benchmark's `extra_info`, the call's own times to its statistics."""
    config = request.config

    def run(call: Callable[[], object], kernel: Kernel) -> None:
        if not benchmark.enabled:
            benchmark(call)
            return
        turns = Turns.within(
            float(config.getoption("benchmark_max_time")),
            seconds_of(call),
            seconds_of(kernel),
            least=max(config.getoption("benchmark_min_rounds"), LEAST_ROUNDS),
        )
        beside = Beside(kernel, turns.kernel_runs)
        beside()
        benchmark.pedantic(call, rounds=turns.rounds, iterations=turns.calls, teardown=beside)
        calls = benchmark.stats.stats.data  # seconds per call, one for each round
        ratio = ratio_of(calls, beside.seconds[: len(calls) + 1])  # its result takes a turn more
        benchmark.extra_info.update(ratio.as_dict())
        config.stash[MEASURED][benchmark.name] = (benchmark.stats.stats.median, ratio)
        limit, known = config.getoption("--fail-above"), config.stash[BASELINE].ratios
        if limit and benchmark.name in known and ratio.exceeds(known[benchmark.name], limit):
            pytest.fail(
                f"{ratio} times the kernel, {known[benchmark.name]:.3g} in the baseline",
                pytrace=False,
            )

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured, baseline = config.stash[MEASURED], config.stash[BASELINE]
    if not measured:
        return
    terminalreporter.section("hot paths beside their reference kernel")
    for line in table(measured, baseline.ratios):
        terminalreporter.write_line(line)
    if not baseline.ratios:
        terminalreporter.write_line(f"no baseline for {baseline.cpu}: save one, --save-baseline")
    if config.getoption("--save-baseline"):
        baseline.save({name: ratio for name, (_, ratio) in measured.items()})
        terminalreporter.write_line(f"saved as the baseline of {baseline.cpu}")
