"""Joules from counters in made trees: never 0 where the truth is "unknown"."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from edge_slm_bench.energy import EnergyMeter, Rail, Rapl, Unavailable, find_meter

Plant = Callable[[dict[str, object]], Path]
ZONES = "sys/class/powercap"


def zone(number: str, name: str, microjoules: int, span: int = 262143328850) -> dict[str, object]:
    folder = f"{ZONES}/intel-rapl:{number}"
    values = {"name": name, "energy_uj": microjoules, "max_energy_range_uj": span}
    return {f"{folder}/{key}": value for key, value in values.items()}


def rail(channel: int, label: str, millivolts: int, milliamperes: int) -> dict[str, object]:
    folder = "sys/class/hwmon/hwmon3"
    return {
        f"{folder}/name": "ina3221",
        f"{folder}/in{channel}_label": label,
        f"{folder}/in{channel}_input": millivolts,
        f"{folder}/curr{channel}_input": milliamperes,
    }


def meter_of(root: Path) -> EnergyMeter:
    meter = find_meter(root)
    assert isinstance(meter, EnergyMeter)
    return meter


def test_packages_are_summed_and_their_parts_are_not(plant: Plant) -> None:
    root = plant(
        {
            **zone("0", "package-0", 1_000_000),
            **zone("0:0", "core", 500_000),
            **zone("1", "package-1", 2_000_000),
            **zone("2", "psys", 7_000_000),
        }
    )
    meter = meter_of(root)
    assert (meter.name, meter.covers, meter.joules) == ("RAPL", "CPU packages", None)
    with meter:
        plant({**zone("0", "package-0", 4_500_000), **zone("1", "package-1", 2_250_000)})
        plant({**zone("0:0", "core", 900_000), **zone("2", "psys", 9_000_000)})
    assert meter.joules == pytest.approx(3.75)
    with meter:  # again, for another figure
        plant(zone("0", "package-0", 5_500_000))
    assert meter.joules == pytest.approx(1.0)


def test_a_counter_starts_again(plant: Plant) -> None:
    meter = meter_of(plant(zone("0", "package-0", 9_000_000, span=10_000_000)))
    with meter:
        plant(zone("0", "package-0", 500_000, span=10_000_000))
    assert meter.joules == pytest.approx(1.5)


def test_a_counter_that_starts_again_more_than_once() -> None:
    """The readings between see every round: here four of 8 J on a counter of 10 J."""
    rapl = Rapl((), (10_000_000,))
    readings = [float(8_000_000 * n % 10_000_000) for n in range(5)]
    joules = [rapl.joules((a,), (b,), 1.0) for a, b in pairwise(readings)]
    assert sum(joules) == pytest.approx(32.0)


def test_a_counter_that_does_not_move_is_not_zero_joules(plant: Plant) -> None:
    meter = meter_of(plant(zone("0", "package-0", 0)))
    with meter:
        pass
    assert meter.joules is None
    assert meter.reason == "RAPL did not move"


def test_a_counter_that_disappears(plant: Plant) -> None:
    root = plant(zone("0", "package-0", 1_000_000))
    meter = meter_of(root)
    with meter:
        (root / ZONES / "intel-rapl:0/energy_uj").unlink()
    assert meter.joules is None
    assert "RAPL could not be read" in meter.reason
    with meter:  # and stays away
        pass
    assert meter.joules is None
    plant(zone("0", "package-0", 1_000_000))
    with meter:  # and comes back
        plant(zone("0", "package-0", 2_000_000))
    assert (meter.joules, meter.reason) == (pytest.approx(1.0), "")


def test_a_module_is_measured_by_its_rail(plant: Plant) -> None:
    root = plant({**rail(2, "VDD_CPU_GPU_CV", 5000, 100), **rail(1, "VDD_IN", 5000, 1000)})
    meter = meter_of(root)
    assert (meter.name, meter.covers) == ("INA3221 VDD_IN", "module")
    start = time.monotonic()
    with meter:
        time.sleep(0.2)
    span = time.monotonic() - start
    assert meter.joules is not None
    assert 5.0 * 0.2 <= meter.joules <= 5.0 * span  # 5 W, whatever the scheduler did


def test_a_rail_is_integrated_by_trapezoids(plant: Plant) -> None:
    root = plant(rail(1, "POM_5V_IN", 5000, 1000))
    source = Rail(*(root / "sys/class/hwmon/hwmon3" / n for n in ("in1_input", "curr1_input")), "")
    before = source.read()
    plant(rail(1, "POM_5V_IN", 5000, 3000))
    assert source.joules(before, source.read(), 2.0) == pytest.approx((5 + 15) / 2 * 2)


def test_a_rail_that_disappears(plant: Plant) -> None:
    root = plant(rail(1, "VDD_IN", 5000, 1000))
    meter = meter_of(root)
    with meter:
        (root / "sys/class/hwmon/hwmon3/curr1_input").unlink()
        time.sleep(0.15)  # the thread finds out, not only the end
    assert meter.joules is None
    assert "INA3221 VDD_IN could not be read" in meter.reason


def test_reasons_why_there_is_none(plant: Plant, tmp_path: Path) -> None:
    nothing = find_meter(tmp_path)
    assert isinstance(nothing, Unavailable)
    assert nothing.reason == "no RAPL or INA3221 counter under /sys"
    with nothing as meter:  # used like any other
        pass
    assert meter.joules is None
    parts = find_meter(plant(rail(1, "VDD_GPU_SOC", 5000, 100)))
    assert isinstance(parts, Unavailable)
    assert "VDD_GPU_SOC" in parts.reason
    plant({**rail(1, "VDD_IN", 5000, 100), "sys/class/hwmon/hwmon3/curr1_input": "?"})
    broken = find_meter(tmp_path)
    assert isinstance(broken, Unavailable)
    assert "could not be read" in broken.reason


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
def test_rapl_is_for_root() -> None:
    # tmp_path is closed to other users as a whole.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name, content in zone("0", "package-0", 1).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{content}\n", encoding="utf-8")
        counter = root / ZONES / "intel-rapl:0/energy_uj"
        counter.chmod(0o000)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            found = find_meter(root)
        finally:
            os.seteuid(user)
    assert found == Unavailable(f"only root may read {counter}")


def test_this_machine() -> None:
    with find_meter() as meter:
        sum(range(100_000))
    assert (meter.joules is None) == bool(meter.reason)
    assert meter.joules is None or meter.joules > 0
