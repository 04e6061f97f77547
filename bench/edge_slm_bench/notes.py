"""What tables say below their rows, and the line that says what machine it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_slm_bench.results import Cell, CellResult, Report

PEER, DISTURBED = "°", "†"
# How a value of each axis of the sweep is written, the most important axis first.
_SAID = {
    "variant": "{}",
    "threads": "{} threads",
    "prompt_tokens": "{} prompt tokens",
    "new_tokens": "{} new tokens",
    "batch": "batch {}",
    "concurrency": "{} workers",
    "rate": "{} requests per second",
}


def notes(results: Sequence[CellResult]) -> list[str]:
    """The marks, and the reasons for them."""
    said = []
    if any(r.peer and r.samples for r in results):
        said.append(f"{PEER} another engine on the same weights")
    reasons: dict[tuple[str, str], list[Cell]] = {}
    for result in results:
        if result.status != "ok":
            reasons.setdefault((result.status, result.reason), []).append(result.cell)
    cells = [result.cell for result in results]
    for (status, reason), those in reasons.items():
        head = f"{DISTURBED} disturbed in every process" if status == "flagged" else status
        said.append(f"{head}: {named(those, cells)}: {reason}".removesuffix(": "))
    samples = [s for r in results if r.status == "ok" for s in r.samples]
    if left_out := sum(bool(s.flags) for s in samples):
        said.append(f"{left_out} of {len(samples)} processes were disturbed and are left out")
    return said


def named(cells: Sequence[Cell], among: Sequence[Cell]) -> str:
    """Which cells of `among` these are, without what is the same in all of them."""
    values = {axis: _values(axis, cells) for axis in _SAID}
    block = [cell for cell in among if all(getattr(cell, axis) in values[axis] for axis in _SAID)]
    if len(block) > len(set(cells)):  # not all combinations of these values: one by one
        return "; ".join(named([cell], among) for cell in cells)
    parts = [
        _said(axis, some) for axis, some in values.items() if len(some) < len(_values(axis, among))
    ]
    return ", ".join(parts) or "all"


def _said(axis: str, values: Sequence[Any]) -> str:
    if axis == "variant" and len(values) > 3:
        return f"{len(values)} variants"
    text = _SAID[axis].format("/".join(v if isinstance(v, str) else f"{v:g}" for v in values))
    return text.removesuffix("s") if values == [1] else text


def _values(axis: str, cells: Sequence[Cell]) -> list[Any]:
    return list(dict.fromkeys(getattr(cell, axis) for cell in cells))


def machine_line(report: Report) -> str:
    """CPU, cores, instruction sets, versions; how often was measured; bandwidth."""
    m = report.machine
    cores = f"{m.get('usable_cores', '?')} of {m.get('cores', '?')} cores"
    packages = ", ".join(f"{name} {version}" for name, version in m.get("packages", {}).items())
    rounds = max((len(r.samples) for r in report.cells), default=0)
    parts = [
        f"{m.get('cpu', 'unknown CPU')}, {cores}, {' '.join(m.get('isa', ()))}".removesuffix(", "),
        f"{m.get('system', '')}, Python {m.get('python', '?')}".removeprefix(", "),
        packages,
        llama_cpp(report),
        f"medians of {rounds} fresh processes per cell, in turn",
        bandwidth(report),
        energy(report),
        "interrupted: not every cell was measured" if report.interrupted else "",
    ]
    return "; ".join(part for part in parts if part)


def llama_cpp(report: Report) -> str:
    """The instruction sets that the peer was compiled with."""
    sets = report.settings.get("llama.cpp")
    return f"llama.cpp compiled with {sets}" if sets else ""


def bandwidth(report: Report) -> str:
    parts = [
        f"{rate / 1e9:.1f} GB/s on {_said('threads', [threads])}"
        for threads, rate in report.bandwidth().items()
    ]
    return f"memory read at {', '.join(parts)}" if parts else ""


def energy(report: Report) -> str:
    """The counter, or that there is none and why."""
    said = report.settings.get("energy") or "no counter"
    known = any(s.joules is not None for r in report.cells for s in r.samples)
    return f"energy by {said}" if known else f"energy per token: unavailable ({said})"


# Part of the report → figure → how it is measured.
DEFINITIONS: Mapping[str, Mapping[str, str]] = {
    "all": {
        "cell": (
            "One variant, threads, scenario, prompt and generated length. Each is measured in "
            "several fresh processes after a warm-up; all cells take turns, round by round. "
            "Figures are medians over the undisturbed processes; every sample is kept in the "
            "JSON report."
        ),
        f"disturbed {DISTURBED}": (
            "Other processes, a hypervisor, heat or a lowered clock took part of the machine "
            "while the process ran. Such processes are left out; a cell that has no other is "
            "marked and shown from them."
        ),
        f"peer {PEER}": (
            "Another engine on the same weights, prompts and threads, in a plain greedy loop "
            "over token ids. Ours runs as it ships: tokenising, command, sampler and text "
            "included."
        ),
        "load": (
            "From a Python that has imported nothing to a model that answers, with all imports and "
            "the check of the files' digests. Cold: the files were out of the page cache; warm: "
            "they were in it."
        ),
        "peak RSS": "The most resident memory of the process, in MB of 2²⁰ bytes.",
        "energy per token": (
            "Joules of the counter while the requests ran ÷ new tokens, prompts included. The "
            "counter sees the whole machine."
        ),
    },
    "single-stream": {
        "disk": "Files of the variant, in MB of 10⁶ bytes.",
        "TTFT": "Time to first token: from the request to its first token, in ms.",
        "TPOT": (
            "Time per output token: (latency - TTFT) ÷ (new tokens - 1). p50 over requests, p90 "
            "and p99 over single steps; after the shortest prompt."
        ),
        "pp, tg": (
            "Prompt processing, tokens ÷ TTFT at the longest prompt; text generation, 1 ÷ TPOT."
        ),
        "× floor": (
            "TPOT ÷ the time in which this machine read as many bytes as a step's weights from "
            "memory just before the process, in the median of some passes over an array or in the "
            "best one; median over processes. About 1 is as fast as memory allows; below 1, part "
            "of the weights stays in the cache."
        ),
    },
    "variations": {
        "variations": (
            "The request of the warm-up, under another words command, under its own, and so on: "
            "an engine that keeps what it computed for the last prompt has only the command to "
            "compute. Peers run as in the other tables, without such a cache."
        ),
    },
    "offline": {
        "batch throughput": "New tokens of all rows ÷ time, prompts included.",
    },
    "server": {
        "latency": "From a request's arrival to its last token, waiting included.",
        "goodput": "Requests per second that were answered within the target latency.",
    },
    "quality": {
        "top-1 agreement": (
            "Share of positions where reference and variant expect the same token most."
        ),
        "perplexity ratio": (
            "exp(mean(log p - log q)) of the tokens that really follow; 1 is no loss."
        ),
        "KL": ("Σ p (log p - log q), reference against variant, in nats: mean and 99.9% quantile."),
        "within tolerance": (
            "Share of answers within ±10% or ±2 words of what was asked, whichever is wider; "
            "the model alone, without the decoder's length promise."
        ),
        "answers that differ": (
            "The same requests in a batch, after a cached prefix, with the prompt in chunks and "
            "with guessed tokens: how many greedy answers have another token anywhere."
        ),
    },
    "endurance": {
        "growth": (
            "Resident memory at the end less that after a tenth of the requests, when every "
            "buffer exists."
        ),
    },
}
