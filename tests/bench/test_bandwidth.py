"""Reading memory: a figure exists and is of bytes per second."""

from __future__ import annotations

import pytest

from edge_slm_bench.bandwidth import read_bandwidth
from edge_slm_bench.machine import machine


@pytest.mark.parametrize("threads", [1, machine().usable_cores])
def test_this_machine(threads: int) -> None:
    bandwidth = read_bandwidth(threads, megabytes=32, seconds=0.05)
    assert 1e8 < bandwidth.median <= bandwidth.best < 1e13  # bytes, neither MB nor bits


def test_no_threads() -> None:
    with pytest.raises(ValueError, match="threads"):
        read_bandwidth(0)
