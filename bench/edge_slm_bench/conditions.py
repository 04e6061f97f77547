"""What disturbed a measurement: other processes, a hypervisor, heat, a lowered clock.

Put around the process of one cell; a cell with flags is not averaged in. Where there
is no /proc or /sys (macOS, Windows) nothing is known and nothing is flagged.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from edge_slm_bench.machine import board, cpu_policies
from edge_slm_bench.sysfs import Periodic, number, text

# Cores that others may use: background services stay below; a process that takes more
# also takes memory bandwidth, the scarce thing of decoding.
BUSY_CORES = 0.15
# Share of the CPU time that a hypervisor may give to others: it makes everything as much
# slower, and figures are to repeat within 10%.
STEAL_SHARE = 0.05
# °C: Intel and AMD slow down from 95 to 100, Jetson modules from 97. A Raspberry Pi does
# from 80, and nothing else shows it.
HOT_CELSIUS, HOT_CELSIUS_RASPBERRY_PI = 95, 80
# Boost clocks of all cores lie up to a quarter below that of one: less is a limit.
FREQUENCY_SHARE = 0.75
# The kernel counts CPU time in ticks of 10 ms: in less time they are all noise.
LEAST_SECONDS = 0.5
# An idle core clocks down: frequencies only mean something while the cell computes.
LEAST_OWN_CORES = 0.5
_LOOK = 0.25  # seconds between looks at the frequencies, which fall as soon as work ends

# Counters that only rise, and rise when the clock is held back.
_THROTTLE_COUNTERS = (
    "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count",
    "sys/class/hwmon/hwmon*/oc*_event_cnt",  # over-current, Jetson
)
# Sensors that are of the processor; others may be hot, or show nonsense.
_OF_PROCESSOR = re.compile(r"cpu|soc|pkg|coretemp|k10temp|zenpower|\btj", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """seconds: of the clock. busy, steal: CPU seconds of all cores since boot, None where
    unknown. own: CPU seconds of this process and of the children it has waited for.
    throttles: events per counter. limits: what holds the clock back now. temperatures: °C.
    """

    seconds: float
    busy: float | None
    steal: float | None
    own: float | None
    throttles: Mapping[str, int]
    limits: tuple[str, ...]
    temperatures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Conditions:
    """Between two snapshots. Cores: CPU seconds per second. steal_share: of the CPU time
    that was wanted, taken as one core at least. throttled: the rise of each counter that
    rose. mhz: of the fastest core, median; max_mhz: what it may reach, or without boost
    where the kernel reports that.
    """

    seconds: float
    own_cores: float | None
    others_cores: float | None
    steal_share: float | None
    throttled: Mapping[str, int]
    limits: tuple[str, ...]
    temperatures_before: Mapping[str, float]
    temperatures_after: Mapping[str, float]
    mhz: float | None
    max_mhz: float | None

    def flags(self, busy_cores: float, hot_celsius: float) -> tuple[str, ...]:
        flags = []
        if self.others_cores is not None and self.others_cores > busy_cores:
            flags.append(f"busy: other processes used {self.others_cores:.1f} cores")
        if self.steal_share is not None and self.steal_share > STEAL_SHARE:
            flags.append(f"steal {self.steal_share:.0%}")
        flags += [f"throttled: {name} rose by {rise}" for name, rise in self.throttled.items()]
        flags += [f"throttled: {limit}" for limit in self.limits]
        temperatures = (self.temperatures_before, self.temperatures_after)
        of_processor = [
            t
            for sensors in temperatures
            for name, t in sensors.items()
            if _OF_PROCESSOR.search(name)
        ]
        if of_processor and max(of_processor) >= hot_celsius:
            flags.append(f"hot: {max(of_processor):.0f} °C")
        if (
            self.mhz
            and self.max_mhz
            and self.mhz < FREQUENCY_SHARE * self.max_mhz
            and (self.own_cores or 0) >= LEAST_OWN_CORES
        ):
            flags.append(f"frequency fell to {self.mhz / self.max_mhz:.0%} of its maximum")
        return tuple(flags)


class Watch:
    """`with Watch() as watch:` around a process that is started and waited for inside.

    What this process and such children use is the cell's own; a child that still runs
    at the end counts as others. flags and as_dict are meaningful after the end only.
    """

    def __init__(self, root: Path = Path("/"), busy_cores: float = BUSY_CORES) -> None:
        self.flags: tuple[str, ...] = ()
        self.conditions: Conditions | None = None
        self._root, self._busy_cores = root, busy_cores

    def __enter__(self) -> Watch:
        self.flags, self.conditions = (), None
        # Before any heat: a cooled policy also lowers the limit that it reports.
        self._max_mhz = _fastest(self._root, "base_frequency", "scaling_max_freq")
        self._seen: list[float] = []
        self._looking = Periodic(self._look, _LOOK)
        self._before = snapshot(self._root)
        self._looking.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._looking.stop()
        after = snapshot(self._root)
        mhz = median(self._seen) if self._seen else None
        self.conditions = between(self._before, after, mhz, self._max_mhz)
        pi = "Raspberry Pi" in (board(self._root) or "")
        hot = HOT_CELSIUS_RASPBERRY_PI if pi else HOT_CELSIUS
        self.flags = self.conditions.flags(self._busy_cores, hot)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; temperatures as name → [before, after]."""
        if not (c := self.conditions):
            return {}
        names = {**c.temperatures_before, **c.temperatures_after}
        before, after = c.temperatures_before, c.temperatures_after
        return {
            "seconds": c.seconds,
            "own_cores": c.own_cores,
            "others_cores": c.others_cores,
            "steal_share": c.steal_share,
            "throttled": dict(c.throttled),
            "limits": list(c.limits),
            "temperatures": {name: [before.get(name), after.get(name)] for name in names},
            "mhz": c.mhz,
            "max_mhz": c.max_mhz,
        }

    def _look(self) -> None:
        if mhz := _fastest(self._root, "scaling_cur_freq"):
            self._seen.append(mhz)


def snapshot(root: Path = Path("/")) -> Snapshot:
    busy, steal = _cpu_seconds(root)
    counters = [path for pattern in _THROTTLE_COUNTERS for path in root.glob(pattern)]
    return Snapshot(
        seconds=time.monotonic(),
        busy=busy,
        steal=steal,
        own=_own_cpu_seconds(),
        throttles={str(path): count for path in counters if (count := number(path)) is not None},
        limits=tuple(_limits(root)),
        temperatures=temperatures(root),
    )


def between(
    before: Snapshot, after: Snapshot, mhz: float | None = None, max_mhz: float | None = None
) -> Conditions:
    """What happened from one snapshot to the other, at a frequency of `mhz`."""
    seconds = after.seconds - before.seconds
    busy, steal, own = (
        None if a is None or b is None else b - a
        for a, b in (
            (before.busy, after.busy),
            (before.steal, after.steal),
            (before.own, after.own),
        )
    )
    own_cores = others = share = None
    if seconds >= LEAST_SECONDS:
        if own is not None:
            own_cores = own / seconds
        if busy is not None and own is not None:
            others = max(0.0, busy - own) / seconds
        if busy is not None and steal is not None:
            share = steal / max(busy + steal, seconds)
    rises: dict[str, int] = {}
    for counter, count in after.throttles.items():
        name, rise = Path(counter).name, count - before.throttles.get(counter, count)
        if rise > 0:  # several cores count one event
            rises[name] = max(rise, rises.get(name, 0))
    return Conditions(
        seconds=seconds,
        own_cores=own_cores,
        others_cores=others,
        steal_share=share,
        throttled=rises,
        limits=tuple(dict.fromkeys((*before.limits, *after.limits))),
        temperatures_before=before.temperatures,
        temperatures_after=after.temperatures,
        mhz=mhz,
        max_mhz=max_mhz,
    )


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """°C by sensor; sensors that are switched off give nonsense and are left out."""
    sensors = [
        (f"{zone.name} {text(zone / 'type') or ''}".strip(), zone / "temp")
        for zone in sorted(root.glob("sys/class/thermal/thermal_zone*"))
    ]
    for path in sorted(root.glob("sys/class/hwmon/hwmon*/temp*_input")):
        label = text(path.with_name(path.name.replace("_input", "_label")))
        names = (path.parent.name, text(path.with_name("name")), label or path.name[:-6])
        sensors.append((" ".join(filter(None, names)), path))
    readings = {name: number(path) for name, path in sensors}
    return {name: t / 1000 for name, t in readings.items() if t is not None and -40e3 < t < 150e3}


def _cpu_seconds(root: Path) -> tuple[float | None, float | None]:
    """(busy, stolen) of all cores since boot: user, nice, system, irq, softirq; steal."""
    first = (text(root / "proc/stat") or "").partition("\n")[0].split()
    if first[:1] != ["cpu"] or len(first) < 9:
        return None, None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[1:9])
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) * tick, steal * tick


def _own_cpu_seconds() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def _limits(root: Path) -> list[str]:
    limits = []
    for device in sorted(root.glob("sys/class/thermal/cooling_device*")):
        kind, step = text(device / "type") or "", number(device / "cur_state") or 0
        if step > 0 and ("cpufreq" in kind or kind == "Processor"):
            limits.append(f"{kind} holds the clock back by {step} steps")
    for alarm in root.glob("sys/class/hwmon/hwmon*/in0_lcrit_alarm"):
        if text(alarm.with_name("name")) == "rpi_volt" and number(alarm):
            limits.append("the power supply's voltage is too low")
    return limits


def _fastest(root: Path, *names: str) -> float | None:
    """MHz of the fastest group of cores, from the first of `names` that is reported."""
    for name in names:
        speeds = [khz / 1000 for policy in cpu_policies(root) if (khz := number(policy / name))]
        if speeds:
            return max(speeds)
    return None
