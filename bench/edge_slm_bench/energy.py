"""Joules that a piece of work took, where the machine has a counter for them.

RAPL      energy of the CPU packages (Linux powercap, drivers intel_rapl): cores, caches,
          memory controller; not the memory itself, not the board. Readable by root alone.
INA3221   power of a whole Jetson module: voltage × current of the rail that feeds it
          (hwmon), integrated over samples by the trapezoid rule.

Both measure the machine, not a process: other work and idle power are in the figure.
Where nothing can be read the answer is None and a reason, never 0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Protocol

from edge_slm_bench.sysfs import Periodic, number, text

# The inputs of a module: Orin NX and Nano, Xavier NX, TX2 (VDD_IN); Nano (POM_5V_IN). Other
# Jetsons only have rails of parts, which do not add up to the module.
MODULE_RAILS = ("VDD_IN", "POM_5V_IN")


class Source(Protocol):
    """name: of the counter. covers: what its joules are of. interval: seconds between
    readings. read raises OSError or ValueError; its values belong to `joules` alone."""

    @property
    def name(self) -> str: ...
    @property
    def covers(self) -> str: ...
    @property
    def interval(self) -> float: ...
    def read(self) -> tuple[float, ...]: ...
    def joules(
        self, before: tuple[float, ...], after: tuple[float, ...], seconds: float
    ) -> float: ...


@dataclass(frozen=True, slots=True)
class Rapl:
    """Counters in µJ that start again at 0 after `ranges`, one of each per package."""

    counters: tuple[Path, ...]
    ranges: tuple[int, ...]
    name: ClassVar[str] = "RAPL"
    covers: ClassVar[str] = "CPU packages"
    # A counter starts again after 65 kJ or more: a minute at 1 kW.
    interval: ClassVar[float] = 10.0

    def read(self) -> tuple[float, ...]:
        return tuple(int(counter.read_text("ascii")) for counter in self.counters)

    def joules(self, before: tuple[float, ...], after: tuple[float, ...], seconds: float) -> float:
        spans = zip(before, after, self.ranges, strict=True)
        return sum((b - a) % span for a, b, span in spans) / 1e6


@dataclass(frozen=True, slots=True)
class Rail:
    """mV and mA of one rail; `read` gives watts."""

    voltage: Path
    current: Path
    label: str
    covers: ClassVar[str] = "module"
    # The chip averages over some milliseconds, and a reading costs bus traffic.
    interval: ClassVar[float] = 0.05

    @property
    def name(self) -> str:
        return f"INA3221 {self.label}"

    def read(self) -> tuple[float, ...]:
        millivolts = int(self.voltage.read_text("ascii"))
        return (millivolts * int(self.current.read_text("ascii")) / 1e6,)

    def joules(self, before: tuple[float, ...], after: tuple[float, ...], seconds: float) -> float:
        return (before[0] + after[0]) / 2 * seconds


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The meter of a machine without a counter: the same use, no joules."""

    reason: str
    joules: ClassVar[None] = None

    def __enter__(self) -> Unavailable:
        return self

    def __exit__(self, *raised: object) -> None:
        return None


class EnergyMeter:
    """`with meter: …` measures what runs inside; it may be used again, for another figure.

    joules: None before the end, and where the counter failed: then `reason` says how.
    """

    def __init__(self, source: Source) -> None:
        self.name, self.covers = source.name, source.covers
        self.joules: float | None = None
        self.reason = "nothing was measured yet"
        self._source = source

    def __enter__(self) -> EnergyMeter:
        self.joules, self.reason = None, ""
        self._total = 0.0
        self._last: tuple[float, tuple[float, ...]] | None = None
        self._sample()
        self._sampler = Periodic(self._sample, self._source.interval)
        self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sampler.stop()
        self._sample()
        if not self.reason and not self._total:
            # As in virtual machines that show a counter and feed it nothing.
            self.reason = f"{self.name} did not move"
        if not self.reason:
            self.joules = self._total

    def _sample(self) -> None:
        if self.reason:
            return
        try:
            now, reading = time.monotonic(), self._source.read()
        except (OSError, ValueError) as error:
            self.reason = f"{self.name} could not be read: {error}"
            return
        if self._last:
            then, before = self._last
            self._total += self._source.joules(before, reading, now - then)
        self._last = now, reading


def find_meter(root: Path = Path("/")) -> EnergyMeter | Unavailable:
    """The meter of the machine whose /sys lies under `root`: a module's rail before RAPL."""
    counter = _rail(root) or _rapl(root)
    if counter is None:
        return Unavailable("no RAPL or INA3221 counter under /sys")
    if isinstance(counter, Unavailable):
        return counter
    try:
        counter.read()
    except PermissionError as error:
        return Unavailable(f"only root may read {error.filename}")
    except (OSError, ValueError) as error:
        return Unavailable(f"{counter.name} could not be read: {error}")
    return EnergyMeter(counter)


def _rail(root: Path) -> Rail | Unavailable | None:
    labels = {
        path: label
        for path in sorted(root.glob("sys/class/hwmon/hwmon*/in[123]_label"))
        if text(path.with_name("name")) == "ina3221" and (label := text(path))
    }
    for path, label in labels.items():
        if label in MODULE_RAILS:
            channel = path.name.removeprefix("in").removesuffix("_label")
            voltage, current = f"in{channel}_input", f"curr{channel}_input"
            return Rail(path.with_name(voltage), path.with_name(current), label)
    if labels:
        return Unavailable(f"no rail of the whole module, only {', '.join(labels.values())}")
    return None


def _rapl(root: Path) -> Rapl | None:
    """Packages alone: their cores and graphics are in them, and memory is not everywhere."""
    zones = sorted(root.glob("sys/class/powercap/intel-rapl:*"))
    packages = {
        zone / "energy_uj": span
        for zone in zones
        if (text(zone / "name") or "").startswith("package")
        and (span := number(zone / "max_energy_range_uj"))
    }
    return Rapl(tuple(packages), tuple(packages.values())) if packages else None
