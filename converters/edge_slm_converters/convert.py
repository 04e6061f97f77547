"""From a checkpoint to a bundle: write the variants, measure them, ship or refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_slm_bench.metrics.examples import Example, Scored, to_scored
from edge_slm_converters import adherence, gate
from edge_slm_converters.adherence import AnswerJudge, Answers
from edge_slm_converters.bit_allocation import int4
from edge_slm_converters.bundle_writer import write_manifest
from edge_slm_converters.calibration_texts import sampled_answers
from edge_slm_converters.checkpoint import Checkpoint, read_checkpoint
from edge_slm_converters.equalise import equalised
from edge_slm_converters.goldens import (
    EXAMPLES,
    built_in_requests,
    golden_ids,
    goldens,
    own_answers,
)
from edge_slm_converters.json_files import read_json
from edge_slm_converters.progress import Progress, Report
from edge_slm_converters.quantise import PRECISIONS
from edge_slm_converters.variants import (
    DEFAULT_VARIANTS,
    REFERENCE,
    VARIANTS,
    Model,
    open_variant,
    write_variant,
)
from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.command import Command, count_words
from edge_slm_runtime.deltas import Delta
from edge_slm_runtime.errors import AdapterInvalid, CheckpointError, EngineError, GateRefused
from edge_slm_runtime.files import write_folder_aside
from edge_slm_runtime.memory import memory_estimate
from edge_slm_runtime.records import Request

PACKAGES = (
    "edge-slm",
    "numpy",
    "numba",
    "onnx",
    "onnxruntime",
    "ctranslate2",
    "safetensors",
    "tokenizers",
)
# Shares of the time that the steps take, in any unit. Measured with a model of 98M parameters.
WRITE, SAMPLE, QUANTISE, MEASURE = 1.0, 25.0, 90.0, 10.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A written variant and its measurements.

    answers: to commanded requests; None of a model without commands. golden_ids: of
    `goldens.golden_ids`. failure: why it cannot be measured, and so never ships.
    """

    variant: Variant
    answers: Answers | None = None
    golden_ids: Sequence[tuple[int, ...]] = ()
    failure: str = ""


def convert(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    variants: Sequence[str] | None = None,
    *,
    name: str | None = None,
    evaluation: Sequence[Example] | None = None,
    judge: AnswerJudge | None = None,
    accept: bool = False,
    adapters: Sequence[Delta] = (),
    progress: Report | None = None,
) -> Manifest:
    """Converts `checkpoint` (its folder, its GGUF file or a Checkpoint) to the bundle folder `out`.

    variants: names of VARIANTS, all of which must keep their budget; None is
    the default ones whose engine is installed, without those outside their budget
    (the manifest's provenance lists them with their figures).
    name: the bundle's, by default the folder's. evaluation: texts on which
    fidelity and adherence are measured against fp32; by default the fp32 model's own greedy
    answers to built-in requests. judge: of relevance and tasks; without one, adherence is
    that of lengths alone. accept: ship variants outside their budget too, and say so
    in the manifest. adapters: kept in the bundle, beside the weights, for requests to choose from;
    to have one in the weights, convert a `merged` checkpoint. progress: called before each step
    with a line that names it and the share of the work that is done.

    Raises CheckpointError, AdapterInvalid, GateRefused, TargetExists, DependencyMissing,
    EngineNotInstalled; then `out` does not exist.
    """
    chosen = chosen_variants(variants)
    out = Path(out)
    with write_folder_aside(out) as folder:
        # The reference is always written, measured against, and dropped if not asked for.
        names = tuple(dict.fromkeys((REFERENCE, *chosen)))
        steps = Progress(progress, _work(names))
        steps.step("reading the checkpoint", WRITE)
        source = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
        recipe = _recipe(source)
        _check_adapters(adapters, source)
        written, quantisation = _write(names, source, folder, steps)
        candidates = _measure(written, source, folder, evaluation, judge, steps)
        failed = {c.variant.name: f"{c.variant.name}: {c.failure}" for c in candidates if c.failure}
        refused = failed | _refusals([c for c in candidates if not c.failure])
        if failed and variants is not None:
            raise GateRefused("; ".join(failed.values()), "leave it out")
        if refused and not accept and variants is not None:
            raise GateRefused(
                "; ".join(refused.values()), "accept it explicitly to ship it all the same"
            )
        steps.step("writing the manifest", WRITE)
        left_out = failed if accept else refused
        shipped = [c for c in candidates if c.variant.name in set(chosen) - set(left_out)]
        for unwanted in set(names) - {c.variant.name for c in shipped}:
            shutil.rmtree(folder / unwanted)
        return write_manifest(
            folder,
            name or out.name,
            source,
            [c.variant for c in shipped],
            goldens(source, {c.variant.name: c.golden_ids for c in shipped}),
            _provenance(source, recipe, shipped, refused, left_out)
            | {"quantisation": quantisation},
            adapters,
        )


def chosen_variants(variants: Sequence[str] | None) -> Sequence[str]:
    """Raises CheckpointError for a name that no variant has."""
    if variants is None:
        variants = [name for name in DEFAULT_VARIANTS if find_spec(VARIANTS[name].engine)]
    if not variants or not set(variants) <= set(VARIANTS):
        raise CheckpointError(
            f"cannot convert to {', '.join(set(variants) - set(VARIANTS)) or 'nothing'}",
            f"variants: {', '.join(VARIANTS)}",
        )
    return variants


def _check_adapters(adapters: Sequence[Delta], source: Checkpoint) -> None:
    """Raises AdapterInvalid for one of another model, or of a name that comes twice."""
    for i, delta in enumerate(adapters):
        delta.check(source.decoder, source.form, source.base)
        if delta.name in [other.name for other in adapters[:i]]:
            raise AdapterInvalid(f"two adapters are named {delta.name}")


def _has_int4(names: Sequence[str]) -> bool:
    return any(VARIANTS[name].precision == "int4" for name in names)


def _work(names: Sequence[str]) -> float:
    """Of all steps, in the unit of WRITE, SAMPLE, QUANTISE and MEASURE."""
    quantise = SAMPLE + QUANTISE if _has_int4(names) else 0.0
    return 2 * WRITE + quantise + len(names) * (WRITE + MEASURE)


def _write(
    names: Sequence[str], source: Checkpoint, folder: Path, steps: Progress
) -> tuple[list[Variant], dict[str, Any]]:
    """The variants, the reference first, and how int4 was quantised."""
    models = {name: Model(source, precision) for name, precision in PRECISIONS.items()}
    steps.step(f"writing {REFERENCE}", WRITE)
    written = [write_variant(REFERENCE, models["fp32"], folder)]
    quantisation = {}
    if _has_int4(names) or source.decoder.norm == "rms":
        with open_variant(folder, source, written[0]) as slm:
            texts = sampled_answers(
                slm, source, lambda line, share: steps.step(line, SAMPLE * share)
            )
        models["int8"] = Model(equalised(source, texts), PRECISIONS["int8"])
    if _has_int4(names):
        fitted, precision, quantisation["int4"] = int4(
            source, texts, lambda line, share: steps.step(line, QUANTISE * share)
        )
        models["int4"] = Model(fitted, precision)
    for name in names[1:]:
        steps.step(f"writing {name}", WRITE)
        written.append(write_variant(name, models[VARIANTS[name].precision], folder))
    return written, quantisation


def _measure(
    written: Sequence[Variant],
    source: Checkpoint,
    folder: Path,
    evaluation: Sequence[Example] | None,
    judge: AnswerJudge | None,
    steps: Progress,
) -> list[Candidate]:
    """Fidelity and adherence of each variant. The first is the reference: it has no fidelity."""
    requests = _adherence_requests(source, evaluation, levelled=judge is not None)
    scored: Sequence[Scored] = ()
    if evaluation is not None:
        scored = to_scored(evaluation, source.codec, source.decoder.positions)
    reference = gate.remembered(gate.logits_of(written[0], source.decoder, folder))
    candidates = []
    for variant in written:
        steps.step(f"measuring {variant.name}", MEASURE)
        is_reference = variant is written[0]
        try:
            with open_variant(folder, source, variant) as slm:
                if is_reference:
                    scored = scored if evaluation is not None else own_answers(slm, source)
                answers = adherence.answer(slm, requests, judge) if requests else None
                ids = golden_ids(slm, source)
                memory = memory_estimate(slm.manifest, variant)
            fidelity = None
            if not is_reference:
                logits = gate.logits_of(variant, source.decoder, folder)
                fidelity = gate.measure(logits, reference, scored, len(source.tokens)).as_dict()
        except EngineError as error:
            if is_reference:  # without it nothing can be measured
                raise CheckpointError(f"the model cannot be run: {error.problem}") from error
            candidates.append(Candidate(variant, failure=error.problem))
            continue
        measured = replace(
            variant,
            fidelity=fidelity,
            adherence=answers.figures() if answers else None,
            peak_rss_mb=round(memory, 1),
        )
        candidates.append(Candidate(measured, answers, ids))
    return candidates


def _adherence_requests(
    source: Checkpoint, evaluation: Sequence[Example] | None, *, levelled: bool
) -> list[Request]:
    """The requests on which adherence is measured; none to a model without commands."""
    if source.form.schema is None:
        return []
    if evaluation is None:
        tokens = source.decoder.positions // 2
        asked = [(a.request, a.command) for a in built_in_requests(source, EXAMPLES, tokens)]
    else:
        asked = [(e.request, Command(e.command.task, count_words(e.response))) for e in evaluation]
    return adherence.requests(source, asked, levelled=levelled)


def _refusals(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Name → the figures of each variant that is outside its budget."""
    reference = candidates[0].answers
    disobedient = {
        c.variant.name: adherence.faults(reference, c.answers)
        for c in candidates
        if reference and c.answers
    }
    return gate.refusals([c.variant for c in candidates], disobedient)


def _recipe(source: Checkpoint) -> dict[str, Any] | None:
    """Training leaves it there; other checkpoints have none. Raises CheckpointError."""
    file = source.path / "recipe.json"
    if not file.is_file():
        return None
    recipe = read_json(file)
    try:
        json.dumps(recipe, allow_nan=False)  # the manifest has no form for what is not finite
    except ValueError:
        raise CheckpointError(f"{file} holds a number that is not finite") from None
    return recipe


def _provenance(
    source: Checkpoint,
    recipe: Mapping[str, Any] | None,
    shipped: Sequence[Candidate],
    refused: Mapping[str, str],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "checkpoint": source.digests(),
        "recipe": recipe,
        "packages": {package: _version(package) for package in PACKAGES},
        "gate": {
            "budgets": {precision: asdict(b) for precision, b in gate.BUDGETS.items()},
            "adherence": adherence.ALLOWED,
            "undecided": gate.undecided([c.variant for c in shipped]),
            "accepted": [why for name, why in refused.items() if name not in left_out],
            "left_out": list(left_out.values()),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
