"""What disturbs a cell is told, and the cell itself disturbs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edge_slm_bench.conditions import Conditions, Snapshot, Watch, between, snapshot, temperatures

Plant = Callable[[dict[str, object]], Path]
SPIN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"
CPU = "sys/devices/system/cpu"
ZONE, HWMON = "sys/class/thermal/thermal_zone0", "sys/class/hwmon/hwmon1"
QUIET = Snapshot(
    seconds=100.0, busy=50.0, steal=1.0, own=5.0, throttles={}, limits=(), temperatures={}
)


def flags(conditions: Conditions) -> tuple[str, ...]:
    return conditions.flags(busy_cores=0.15, hot_celsius=95)


def policy(current: int, **others: int) -> dict[str, object]:
    folder = f"{CPU}/cpufreq/policy0"
    values = {"scaling_cur_freq": current, "scaling_max_freq": 2_000_000, **others}
    return {f"{folder}/{name}": khz for name, khz in values.items()}


def test_a_quiet_cell() -> None:
    """Two cores for ten seconds, all of them its own."""
    conditions = between(QUIET, replace(QUIET, seconds=110.0, busy=70.5, own=25.0))
    assert conditions.own_cores == pytest.approx(2.0)
    assert conditions.others_cores == pytest.approx(0.05)
    assert conditions.steal_share == 0
    assert flags(conditions) == ()


def test_others_are_what_the_cell_did_not_use() -> None:
    conditions = between(QUIET, replace(QUIET, seconds=110.0, busy=76.0, own=25.0))
    assert flags(conditions) == ("busy: other processes used 0.6 cores",)
    assert conditions.flags(busy_cores=1.0, hot_celsius=95) == ()


def test_a_child_that_began_before_the_watch_makes_no_negative_others() -> None:
    conditions = between(QUIET, replace(QUIET, seconds=110.0, busy=51.0, own=25.0))
    assert conditions.others_cores == 0


def test_steal_is_a_share_of_the_time_that_was_wanted() -> None:
    busy = replace(QUIET, seconds=110.0, busy=67.6, own=22.6, steal=3.4)
    assert flags(between(QUIET, busy)) == ("steal 12%",)
    idle = replace(QUIET, seconds=110.0, busy=50.1, own=5.1, steal=1.1)
    assert flags(between(QUIET, idle)) == ()  # half of a trifle


def test_a_moment_is_not_judged() -> None:
    conditions = between(QUIET, replace(QUIET, seconds=100.1, busy=60.0, steal=9.0))
    assert (conditions.own_cores, conditions.others_cores, conditions.steal_share) == (None,) * 3
    assert flags(conditions) == ()


def test_throttling_of_several_cores_is_one_event(plant: Plant) -> None:
    def counts(core: int, package: int) -> dict[str, object]:
        return {
            f"{CPU}/cpu{n}/thermal_throttle/{name}_throttle_count": count
            for n in range(2)
            for name, count in (("core", core * n), ("package", package))
        }

    with Watch(plant(counts(2, 7))) as watch:
        plant(counts(5, 7))
    assert watch.flags == ("throttled: core_throttle_count rose by 3",)
    with Watch(plant({f"{HWMON}/oc1_event_cnt": 4})) as watch:
        plant({f"{HWMON}/oc1_event_cnt": 5})
    assert watch.flags == ("throttled: oc1_event_cnt rose by 1",)


def test_a_clock_that_is_held_back(plant: Plant) -> None:
    device = "sys/class/thermal/cooling_device"
    root = plant(
        {
            f"{device}0/type": "thermal-cpufreq-0",
            f"{device}0/cur_state": 0,
            f"{device}1/type": "pwm-fan",
            f"{device}1/cur_state": 3,
            f"{HWMON}/name": "rpi_volt",
            f"{HWMON}/in0_lcrit_alarm": 0,
        }
    )
    with Watch(root) as watch:
        pass
    assert watch.flags == ()
    with Watch(root) as watch:
        plant({f"{device}0/cur_state": 2, f"{HWMON}/in0_lcrit_alarm": 1})
    assert watch.flags == (
        "throttled: thermal-cpufreq-0 holds the clock back by 2 steps",
        "throttled: the power supply's voltage is too low",
    )


def test_temperatures(plant: Plant) -> None:
    sensors: dict[str, object] = {
        f"{ZONE}/type": "cpu-thermal",
        f"{ZONE}/temp": 61500,
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
        "sys/class/thermal/thermal_zone1/temp": -256000,  # switched off
        f"{HWMON}/name": "coretemp",
        f"{HWMON}/temp1_label": "Package id 0",
        f"{HWMON}/temp1_input": 70000,
        "sys/class/hwmon/hwmon2/name": "nct6775",
        "sys/class/hwmon/hwmon2/temp7_input": 127000,  # not connected
    }
    root = plant(sensors)
    assert temperatures(root) == {
        "thermal_zone0 cpu-thermal": 61.5,
        "hwmon1 coretemp Package id 0": 70.0,
        "hwmon2 nct6775 temp7": 127.0,
    }
    with Watch(root) as watch:
        plant({f"{HWMON}/temp1_input": 82000})
    assert watch.flags == ()
    assert watch.as_dict()["temperatures"]["hwmon1 coretemp Package id 0"] == [70.0, 82.0]
    with Watch(root) as watch:
        plant({f"{HWMON}/temp1_input": 97000})
    assert watch.flags == ("hot: 97 °C",)
    plant({f"{HWMON}/temp1_input": 82000})
    with Watch(plant({"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})) as watch:
        pass
    assert watch.flags == ("hot: 82 °C",)


def test_a_clock_that_fell(plant: Plant) -> None:
    busy = replace(QUIET, seconds=110.0, busy=60.0, own=15.0)
    conditions = between(QUIET, busy, mhz=1220, max_mhz=2000)
    assert flags(conditions) == ("frequency fell to 61% of its maximum",)
    idle = replace(QUIET, seconds=110.0)
    assert flags(between(QUIET, idle, mhz=1220, max_mhz=2000)) == ()
    assert flags(between(QUIET, busy, mhz=1600, max_mhz=2000)) == ()


def test_frequencies_are_those_during_the_work(plant: Plant) -> None:
    root = plant(policy(1_900_000))
    with Watch(root) as watch:
        time.sleep(0.6)
        plant(policy(600_000))  # idle again
    assert watch.conditions
    assert (watch.conditions.mhz, watch.conditions.max_mhz) == (1900, 2000)
    plant(policy(1_900_000, base_frequency=1_800_000))  # without boost, as Intel tells
    with Watch(root) as watch:
        pass
    assert watch.as_dict()["max_mhz"] == 1800
    assert watch.as_dict()["mhz"] is None  # too short for a look


def test_where_nothing_is_told(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    assert (watch.flags, watch.as_dict()) == ((), {})
    with watch:
        pass
    assert watch.flags == ()
    told = watch.as_dict()
    assert told.pop("seconds") >= 0
    assert not any(told.values())
    assert told["others_cores"] is None


def test_the_watch_tells_of_work_that_failed(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    with pytest.raises(RuntimeError, match="died"), watch:
        raise RuntimeError("died")
    assert watch.conditions is not None


needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")


@needs_proc
def test_the_cells_own_child_is_not_others() -> None:
    """However busy the machine is: of its CPU time, what the child used is not others'."""
    script = "import time\nwhile time.process_time() < 0.8: pass"
    before = snapshot()
    with Watch() as watch:
        subprocess.run([sys.executable, "-c", script], check=True)
    busy = _known(snapshot().busy) - _known(before.busy)
    told = json.loads(json.dumps(watch.as_dict()))
    assert told["own_cores"] * told["seconds"] >= 0.8
    assert 0 <= told["others_cores"] * told["seconds"] <= busy - 0.8 + 0.2


@needs_proc
def test_a_spinner_beside_the_cell_is_others() -> None:
    with subprocess.Popen([sys.executable, "-c", SPIN.format(60)]) as spinner:
        try:
            begun = _cpu_seconds(spinner.pid)
            with Watch() as watch:
                while _cpu_seconds(spinner.pid) < begun + 0.6:
                    subprocess.run([sys.executable, "-c", SPIN.format(0.1)], check=True)
        finally:
            spinner.kill()
    assert watch.conditions
    others = _known(watch.conditions.others_cores)
    assert others * watch.conditions.seconds > 0.5
    assert others <= 0.15 or watch.flags[0].startswith("busy: other processes used ")


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _cpu_seconds(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
