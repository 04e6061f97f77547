"""Which variant to choose, and with how many threads: rules over measured rows.

Of the rows that keep the limits, those within their fidelity budget go first, then
those whose fidelity was not measured, and only where there are none the ones outside
(an accepted variant of the bundle). Among them the quickest answer of 32 words wins;
what comes within 5% of it counts as equally quick, and then fewer threads, less
memory, less disk and the better top-1 agreement decide, in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from statistics import median
from typing import Any

from edge_slm_runtime.bundle import Manifest, Variant

WORDS = (16, 32, 64)
DECIDING = 32  # words whose latency decides
SAME = 1.05
UNSTEADY = 1.5  # slowest ÷ quickest sample


@dataclass(frozen=True, slots=True)
class VariantRow:
    """A variant with a number of threads, and every sample of it.

    top1: agreement with fp32. faithful: within the fidelity budget of the bundle; None
    where it was not measured. reason: why there are no samples. answers_ms: latency of a
    commanded answer, by its words. Memory in MiB.
    """

    variant: str
    engine: str
    precision: str
    threads: int
    disk_bytes: int
    top1: float | None = None
    faithful: bool | None = None
    reason: str = ""
    load_ms: tuple[float, ...] = ()
    ttft_ms: tuple[float, ...] = ()
    tpot_ms: tuple[float, ...] = ()
    answers_ms: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    peak_rss_mb: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.variant} on {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def measured(self) -> bool:
        return bool(self.peak_rss_mb)

    @property
    def memory_mb(self) -> float:
        return median(self.peak_rss_mb)

    def latency_ms(self, words: int | None = None) -> float:
        """Of an answer of `words`; by default of the length that decides."""
        return median(self.answers_ms[words or deciding(self.answers_ms)])

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: the samples, and their medians."""
        medians = None
        if self.measured:
            medians = {
                "load_ms": median(self.load_ms),
                "ttft_ms": median(self.ttft_ms),
                "tpot_ms": median(self.tpot_ms),
                "answers_ms": {words: self.latency_ms(words) for words in self.answers_ms},
                "peak_rss_mb": self.memory_mb,
            }
        return {**asdict(self), "medians": medians}


def deciding(words: Iterable[int]) -> int:
    """The length whose latency decides: 32 words, or what comes nearest."""
    return min(words, key=lambda n: abs(n - DECIDING))


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device allows; None allows everything. The latency is of 32 words."""

    max_memory_mb: float | None = None
    max_latency_ms: float | None = None

    def missed_by(self, row: VariantRow) -> tuple[str, ...]:
        """The limits that a measured row does not keep, in words."""
        checks = (
            (row.memory_mb, self.max_memory_mb, "MB"),
            (row.latency_ms(), self.max_latency_ms, "ms"),
        )
        return tuple(
            f"{value:.{0 if value >= 100 else 1}f} {unit}, allowed {limit:g}"
            for value, limit, unit in checks
            if limit is not None and value > limit
        )

    def excess(self, row: VariantRow) -> float:
        """The worst of measured ÷ allowed; at most 1 where the row fits."""
        pairs = ((row.memory_mb, self.max_memory_mb), (row.latency_ms(), self.max_latency_ms))
        return max((value / limit for value, limit in pairs if limit), default=0.0)


@dataclass(frozen=True, slots=True)
class Advice:
    """chosen: None where nothing fits; line: then says what would."""

    chosen: VariantRow | None
    line: str
    remarks: tuple[str, ...] = ()


def advise(rows: Sequence[VariantRow], limits: Limits) -> Advice:
    """The row to choose among those measured, and why."""
    measured = [row for row in rows if row.measured]
    fitting = [row for row in measured if not limits.missed_by(row)]
    if not measured:
        return Advice(None, "nothing could be measured")
    if not fitting:
        return Advice(None, _what_would(min(measured, key=limits.excess), limits))
    faithful = max(map(_faith, fitting))
    pool = [row for row in fitting if _faith(row) == faithful]
    quickest = min(row.latency_ms() for row in pool)
    equal = [row for row in pool if row.latency_ms() <= quickest * SAME]
    chosen = min(equal, key=_cost)
    near = "" if chosen.latency_ms() == quickest else "within 5% of "
    line = f"choose {chosen.name}: {_figures(chosen)}; " + (
        "the only one that fits" if len(pool) == 1 else f"{near}the quickest of {len(pool)}"
    )
    return Advice(chosen, line, tuple(_remarks(chosen, measured, limits)))


def thread_choices(rows: Iterable[VariantRow]) -> dict[str, int]:
    """By variant the threads that are to be taken, of those that were measured with several
    numbers: the fewest whose answers come within 5% of the quickest."""
    by_variant: dict[str, list[VariantRow]] = {}
    for row in rows:
        if row.measured:
            by_variant.setdefault(row.variant, []).append(row)
    chosen = {}
    for variant, measured in by_variant.items():
        quickest = min(row.latency_ms() for row in measured)
        equal = [row.threads for row in measured if row.latency_ms() <= quickest * SAME]
        if len(measured) > 1:
            chosen[variant] = min(equal)
    return chosen


def _faith(row: VariantRow) -> int:
    return {True: 2, None: 1, False: 0}[row.faithful]


def _cost(row: VariantRow) -> tuple[float, ...]:
    """What decides between rows that are equally quick."""
    return (row.threads, row.memory_mb, row.disk_bytes, -(row.top1 or 0.0), row.latency_ms())


def _figures(row: VariantRow) -> str:
    return (
        f"{deciding(row.answers_ms)} words in {row.latency_ms():.1f} ms, {row.memory_mb:.0f} MB"
        + ("" if row.top1 is None else f", top-1 {row.top1:.1%}")
    )


def _what_would(closest: VariantRow, limits: Limits) -> str:
    wanted = (
        ("--max-memory-mb", closest.memory_mb, limits.max_memory_mb),
        ("--max-latency-ms", closest.latency_ms(), limits.max_latency_ms),
    )
    options = " ".join(
        f"{option} {ceil(value)}" for option, value, limit in wanted if limit and value > limit
    )
    return f"nothing fits; the closest is {closest.name} ({_figures(closest)}): {options} admits it"


def _remarks(chosen: VariantRow, measured: Sequence[VariantRow], limits: Limits) -> Iterable[str]:
    if chosen.faithful is None:
        yield f"the bundle does not say how faithful {chosen.variant} is to fp32"
    if chosen.faithful is False:
        yield (
            f"{chosen.variant} is outside its fidelity budget and was accepted as it is: "
            "read its answers before you ship it"
        )
    samples = chosen.answers_ms[deciding(chosen.answers_ms)]
    if max(samples) > UNSTEADY * min(samples):
        yield f"unsteady: between {min(samples):.1f} and {max(samples):.1f} ms, the median decides"
    quickest = min(measured, key=VariantRow.latency_ms)
    if quickest is chosen:
        return
    gain = f"{quickest.name} is {chosen.latency_ms() / quickest.latency_ms():.2f} times as quick"
    if missed := limits.missed_by(quickest):
        yield f"{gain}, but does not fit: {' and '.join(missed)}"
    elif _faith(quickest) < _faith(chosen):
        known = quickest.faithful is False
        yield f"{gain}, but {'outside its fidelity budget' if known else 'of unknown fidelity'}"
    else:
        yield f"{gain}: too little for what it costs"


def faithfulness(manifest: Manifest, variant: Variant) -> bool | None:
    """Whether a variant keeps the budget that its bundle was made with; None: not measured.

    fp32 without figures is what the others are measured against.
    """
    gate = manifest.provenance.get("gate")
    budgets = gate.get("budgets") if isinstance(gate, Mapping) else None
    budget = budgets.get(variant.precision) if isinstance(budgets, Mapping) else None
    if variant.fidelity is None:
        return True if variant.precision == "fp32" else None
    try:
        return bool(
            variant.fidelity["top1"] >= budget["top1"]  # type: ignore[index]
            and variant.fidelity["perplexity_ratio"] <= budget["perplexity_ratio"]  # type: ignore[index]
        )
    except (KeyError, TypeError):  # the provenance is free data
        return None
