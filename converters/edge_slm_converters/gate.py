"""The gate: a variant that drifts too far from fp32, or obeys less, is refused.

Fidelity is measured at the positions of the response only: training asks nothing of the
others. The reference is our fp32 graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from edge_slm_bench.metrics.examples import Scored
from edge_slm_bench.metrics.fidelity import Fidelity, FidelityMeter
from edge_slm_converters.arrays import Float32
from edge_slm_converters.graph import write_all_logits
from edge_slm_runtime.bundle import Variant
from edge_slm_runtime.cores import default_threads
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError
from edge_slm_runtime.sampling import not_finite

LogitsOf = Callable[[Sequence[int]], Float32]  # ids [S] → logits [S,V]
SURE = 1.96  # standard errors on either side of a 95% interval
MEMORY = 512 << 20  # bytes of logits that are kept while variants are measured


@dataclass(frozen=True, slots=True)
class Budget:
    """The least top-1 agreement and the most perplexity ratio, both against fp32."""

    top1: float
    perplexity_ratio: float


BUDGETS: Mapping[str, Budget] = {
    "fp32": Budget(top1=0.999, perplexity_ratio=1.001),
    "int8": Budget(top1=0.98, perplexity_ratio=1.01),
    "int4": Budget(top1=0.95, perplexity_ratio=1.03),
}


def measure(
    candidate: LogitsOf, reference: LogitsOf, sequences: Sequence[Scored], tokenizer_size: int
) -> Fidelity:
    """Fidelity over the response positions of all sequences, the padding of the
    vocabulary left out. Raises EngineError when a logit of the candidate is not finite,
    CheckpointError when one of the reference is not, or when there is too little to score."""
    meter = FidelityMeter()
    try:
        for sequence in sequences:
            rows = slice(sequence.prompt - 1, len(sequence.ids) - 1)
            expected, actual = (
                of(sequence.ids)[rows, :tokenizer_size] for of in (reference, candidate)
            )
            if not np.isfinite(actual).all():
                raise not_finite()
            meter.add(expected, actual, np.array(sequence.ids[sequence.prompt :], np.int64))
        return meter.result()
    except ValueError as error:
        raise CheckpointError(f"fidelity cannot be measured: {error}") from None


def remembered(compute: LogitsOf) -> LogitsOf:
    """The same logits, kept as far as MEMORY goes: the reference is asked for every variant."""
    kept: dict[tuple[int, ...], Float32] = {}
    free = MEMORY

    def logits(ids: Sequence[int]) -> Float32:
        nonlocal free
        if (rows := kept.get(tuple(ids))) is None:
            rows = compute(ids)
            if rows.nbytes <= free:
                kept[tuple(ids)] = rows = rows.copy()
                free -= rows.nbytes
        return rows

    return logits


def refusals(
    variants: Sequence[Variant], disobedient: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> dict[str, str]:
    """Name → the figures, of each measured variant that is outside its budget beyond doubt: with
    its whole 95% interval.

    disobedient: name → its `adherence.faults`.
    """
    refused = {}
    for variant in variants:
        faults = list(disobedient.get(variant.name, ()))
        if not _keeps(variant, SURE):
            faults.insert(0, _figures(variant))
        if faults:
            refused[variant.name] = f"{variant.name}: {', '.join(faults)}"
    return refused


def undecided(variants: Sequence[Variant]) -> list[str]:
    """The figures of each variant outside its budget by less than chance may give: it is kept."""
    return [
        f"{variant.name}: {_figures(variant)}"
        for variant in variants
        if _keeps(variant, SURE) and not _keeps(variant, 0.0)
    ]


def _keeps(variant: Variant, errors: float) -> bool:
    """Whether both figures, improved by so many standard errors, are inside the budget."""
    if (figures := variant.fidelity) is None:
        return True
    budget = BUDGETS[variant.precision]
    # NaN is refused.
    return (
        figures["top1"] + errors * figures["top1_error"] >= budget.top1
        and figures["perplexity_ratio"] - errors * figures["perplexity_ratio_error"]
        <= budget.perplexity_ratio
    )


def _figures(variant: Variant) -> str:
    budget, figures = BUDGETS[variant.precision], variant.fidelity or {}
    return (
        f"top-1 agreement {figures['top1']:.4f} ± {figures['top1_error']:.4f} "
        f"(at least {budget.top1}), perplexity ratio {figures['perplexity_ratio']:.4f} ± "
        f"{figures['perplexity_ratio_error']:.4f} (at most {budget.perplexity_ratio}) "
        f"over {figures['positions']} positions"
    )


def logits_of(variant: Variant, decoder: Decoder, folder: Path) -> LogitsOf:
    """Of a variant that is below `folder`."""
    return _LOGITS[variant.engine](folder / variant.path, decoder, variant.precision)


def onnx_logits(folder: Path, decoder: Decoder, precision: str) -> LogitsOf:
    """Logits of every position from the very weights that ship."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = write_all_logits(folder)
    try:
        session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
    finally:
        model.unlink()
    caches = [i.name for i in session.get_inputs() if i.name.startswith("past_key_values.")]

    def logits(ids: Sequence[int]) -> Float32:
        length = len(ids)
        empty = np.zeros((1, decoder.kv_heads, length, decoder.head_width), np.float32)
        feed = {
            "input_ids": np.array([ids], np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
            "seqlens_k": np.array([length - 1], np.int32),
            "total_sequence_length": np.array(length, np.int32),
            **dict.fromkeys(caches, empty),
        }
        result: Float32 = session.run(["logits"], feed)[0][0]
        return result

    return logits


def numba_logits(folder: Path, decoder: Decoder, precision: str) -> LogitsOf:
    from edge_slm_runtime.engines.base import EngineOptions
    from edge_slm_runtime.engines.numba_engine import NumbaEngine

    engine = NumbaEngine(folder, decoder, EngineOptions(precision, default_threads()))

    def logits(ids: Sequence[int]) -> Float32:
        every = engine.new_pass(engine.new_cache(1).array, len(ids), len(ids))
        result: Float32 = every.run([ids], [0])[0]
        return result

    return logits


def ctranslate2_logits(folder: Path, decoder: Decoder, precision: str) -> LogitsOf:
    import ctranslate2

    compute_type = "int8_float32" if precision == "int8" else "float32"
    generator = ctranslate2.Generator(str(folder), device="cpu", compute_type=compute_type)

    def logits(ids: Sequence[int]) -> Float32:
        result: Float32 = np.asarray(generator.forward_batch([list(ids)]), np.float32)[0]
        return result

    return logits


_LOGITS: Mapping[str, Callable[[Path, Decoder, str], LogitsOf]] = {
    "onnxruntime": onnx_logits,
    "numba": numba_logits,
    "ctranslate2": ctranslate2_logits,
}
