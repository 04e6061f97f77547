"""Every variant and thread count of a bundle, measured within some seconds.

Each row is measured in fresh processes that take turns, with the same commanded
requests. The cheapest rows come first, and as many rounds follow as the time allows.
A row that the time does not allow at all says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

from edge_slm_bench.advice import WORDS, VariantRow, faithfulness
from edge_slm_bench.process import launch
from edge_slm_bench.runners import Spec
from edge_slm_bench.runners.edge_slm import long_words, spec_of
from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.command import Command
from edge_slm_runtime.cores import default_threads
from edge_slm_runtime.errors import (
    BadSetting,
    DependencyMissing,
    EngineError,
    OutOfMemory,
    VariantNotFound,
)

REQUEST = "a red fox in the snow"
ROUNDS = 7  # more would only take time
_LATE = 1.2  # a round may take this much longer than the one before

# Errors of one row alone; any other error concerns all of them.
_ROW_ERRORS = (EngineError, DependencyMissing, OutOfMemory)

QuickProgress = tuple[list[VariantRow], int, int]


def thread_counts(most: int | None = None) -> tuple[int, ...]:
    """1, 2, 4, … and `most`: by default what the runtime would take at most."""
    most = most or default_threads()
    return (*(n for n in (1, 2, 4, 8, 16, 32, 64) if n < most), most)


def chosen_variants(manifest: Manifest, names: Sequence[str] | None) -> list[Variant]:
    """Those of `names`, by default all. Raises VariantNotFound."""
    there = {variant.name: variant for variant in manifest.variants}
    for name in names or ():
        if name not in there:
            raise VariantNotFound(
                f"{manifest.name} has no variant {name!r}", f"it has {', '.join(there)}"
            )
    return [there[name] for name in names or there]


def requests_of(manifest: Manifest) -> dict[int, dict[str, Any]]:
    """Words → arguments of `SLM.generate`, of the lengths that the model can keep.

    The task is the first one that training saw at all of them. Raises BadSetting.
    """
    form, positions = manifest.prompt, manifest.model.positions
    lengths = [n for n in WORDS if n <= long_words(form)[0] and 2 * n + 48 <= positions]
    if not lengths:
        raise BadSetting(
            f"the model's {positions} positions hold no answer of {WORDS[0]} words",
            "'edge-slm bench' measures by tokens",
        )
    if not (schema := form.schema):
        return {n: {"request": REQUEST, "words": n} for n in lengths}
    top = schema.levels - 1

    def kept(task: str) -> bool:
        return not any(schema.check(Command(task, n, top)).warnings for n in lengths)

    task = next(filter(kept, schema.tasks), schema.tasks[0])
    return {n: {"request": REQUEST, "task": task, "words": n, "relevance": top} for n in lengths}


def measure(
    bundle: str,
    manifest: Manifest,
    variants: Sequence[Variant],
    threads: Sequence[int],
    seconds: float,
    rounds: int = ROUNDS,
) -> Iterator[QuickProgress]:
    """Measures all variants × threads in about `seconds`, never much more.

    rounds: processes per row, at most. Yields before the first process and after each:
    all rows as they are by then, and how many processes of how many have ended. Raises
    BadSetting, and the BundleError of a bundle that cannot be loaded.
    """
    deadline = monotonic() + seconds
    requests = requests_of(manifest)
    cells = {(v.name, n): (v, n) for v in variants for n in threads}
    rows = {key: _row(manifest, variant, n) for key, (variant, n) in cells.items()}
    # Cheap rows come first: they are chosen more often.
    order = sorted(cells, key=lambda key: cells[key][0].weight_bytes_per_token / cells[key][1])
    ended, total = 0, len(order)
    yield list(rows.values()), ended, total
    for number in range(1, rounds + 1):
        began = monotonic()
        for key in order:
            variant, n = cells[key]
            rows[key] = _measured(rows[key], spec_of(bundle, variant), n, requests, deadline)
            ended += 1
            yield list(rows.values()), ended, total
        order = [key for key in order if rows[key].measured]
        took = (monotonic() - began) * _LATE
        more = min(rounds - number, int(max(0.0, deadline - monotonic()) / took))
        total = ended + more * len(order)
        if not more:
            return


def _measured(
    row: VariantRow, spec: Spec, threads: int, requests: Mapping[int, Any], deadline: float
) -> VariantRow:
    """The row with the samples of one more process, or with why it has none."""
    job = {
        "kind": "answers",
        "spec": spec.as_dict(),
        "threads": threads,
        "requests": list(requests.values()),
        "repetitions": 1,
    }
    try:
        if (left := deadline - monotonic()) <= 0:
            raise EngineError("no time left")
        result = launch(job, timeout_s=left)
    except _ROW_ERRORS as error:
        if row.measured:
            return row
        late = monotonic() >= deadline
        return replace(row, reason="no time left: give more --seconds" if late else str(error))
    return _with(row, list(requests), result)


def _row(manifest: Manifest, variant: Variant, threads: int) -> VariantRow:
    reference = variant.precision == "fp32" and variant.fidelity is None
    return VariantRow(
        variant=variant.name,
        engine=variant.engine,
        precision=variant.precision,
        threads=threads,
        disk_bytes=variant.bytes,
        top1=1.0 if reference else (variant.fidelity or {}).get("top1"),
        faithful=faithfulness(manifest, variant),
        reason="not measured",
    )


def _with(row: VariantRow, words: Sequence[int], result: Mapping[str, Any]) -> VariantRow:
    """The row with the samples of one more process."""
    stats = [answer["stats"] for answers in result["answers"] for answer in answers]
    answers_ms = {n: row.answers_ms.get(n, ()) for n in words}
    for answers in result["answers"]:
        for n, answer in zip(words, answers, strict=True):
            answers_ms[n] = (*answers_ms[n], answer["stats"]["total_ms"])
    return replace(
        row,
        reason="",
        load_ms=(*row.load_ms, result["load_ms"]),
        ttft_ms=(*row.ttft_ms, *(s["ttft_ms"] for s in stats)),
        tpot_ms=(*row.tpot_ms, *(s["tpot_ms"] for s in stats if s["tpot_ms"] is not None)),
        answers_ms=answers_ms,
        peak_rss_mb=(*row.peak_rss_mb, result["peak_rss_mb"]),
    )
