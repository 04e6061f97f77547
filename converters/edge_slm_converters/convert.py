"""A checkpoint in, a bundle out: write the variants, measure them, ship or refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_slm_bench.metrics.examples import Example, Scored, to_scored
from edge_slm_converters import adherence, gate
from edge_slm_converters.adherence import Judge
from edge_slm_converters.bit_allocation import int4
from edge_slm_converters.bundle_writer import BundleWriter
from edge_slm_converters.checkpoint import Checkpoint, read_checkpoint, read_json
from edge_slm_converters.ct2 import write_ctranslate2
from edge_slm_converters.files import written_aside
from edge_slm_converters.goldens import (
    EXAMPLES,
    commanded_requests,
    goldens,
    own_answers,
    sampled_answers,
)
from edge_slm_converters.graph import write_graph
from edge_slm_converters.panels import write_panels
from edge_slm_converters.quantise import Precision
from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.command import Command, count_words
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import CheckpointError, GateRefused
from edge_slm_runtime.memory import memory_estimate


@dataclass(frozen=True, slots=True)
class Target:
    """What a variant's name stands for."""

    engine: str
    precision: str


VARIANTS: Mapping[str, Target] = {
    "onnx-fp32": Target("onnxruntime", "fp32"),
    "onnx-int8": Target("onnxruntime", "int8"),
    "onnx-int4": Target("onnxruntime", "int4"),
    "numba-int8": Target("numba", "int8"),
    "numba-int4": Target("numba", "int4"),
    "ctranslate2-int8": Target("ctranslate2", "int8"),
    "ctranslate2-float32": Target("ctranslate2", "fp32"),
}
DEFAULT_VARIANTS = tuple(name for name in VARIANTS if name != "ctranslate2-float32")
REFERENCE = "onnx-fp32"  # what all others are measured against
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


def convert(
    checkpoint: str | Path,
    out: str | Path,
    variants: Sequence[str] | None = None,
    *,
    name: str | None = None,
    evaluation: Sequence[Example] | None = None,
    judge: Judge | None = None,
    accept: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Converts the folder `checkpoint` to the bundle folder `out`.

    variants: names of VARIANTS, all of which must keep their budget; None is
    the default ones whose engine is installed, without those outside their budget
    (the manifest's provenance says which were left out, and their figures).
    name: the bundle's, by default the folder's. evaluation: texts on which
    fidelity and adherence are measured against fp32; by default the fp32 model's own greedy
    answers to commanded requests. judge: of relevance and tasks; without one, adherence is
    that of lengths alone. accept: ship variants outside their budget too, and say so
    in the manifest. progress: called with a line before each step.

    Raises CheckpointError, GateRefused, TargetExists, DependencyMissing,
    EngineNotInstalled; then `out` does not exist.
    """
    chosen = variants
    if chosen is None:
        chosen = [name for name in DEFAULT_VARIANTS if find_spec(VARIANTS[name].engine)]
    if not chosen or not set(chosen) <= set(VARIANTS):
        raise CheckpointError(
            f"cannot convert to {', '.join(chosen) or 'nothing'}",
            f"variants: {', '.join(VARIANTS)}",
        )
    out, say = Path(out), progress or (lambda line: None)
    with written_aside(out) as folder:
        say("reading the checkpoint")
        source = read_checkpoint(checkpoint)
        recipe = _recipe(source)
        writer = BundleWriter(folder, source, name or out.name)
        # The reference is always written, measured against, and dropped if not asked for.
        written: list[Variant] = []
        models: dict[str, tuple[Checkpoint, str | Precision]] = {
            name: (source, name) for name in ("fp32", "int8")
        }
        forms: dict[str, Any] = {}
        for variant in dict.fromkeys((REFERENCE, *chosen)):
            say(f"writing {variant}")
            wanted = VARIANTS[variant].precision
            if wanted not in models:  # int4, which all engines share
                writer.write_manifest(written)
                texts = sampled_answers(folder, written[0], source)
                model, precision, forms[wanted] = int4(source, texts)
                models[wanted] = model, precision
            written.append(_write(variant, *models[wanted], folder))
        writer.write_manifest(written)

        say("measuring fidelity")
        if evaluation is None:
            scored = own_answers(folder, written[0], source)
        else:
            scored = to_scored(evaluation, source.schema, source.codec, source.decoder.positions)
        written = _measured(written, source, source.decoder, folder, scored)
        say("measuring adherence")
        written, disobedient = _answered(written, source, folder, evaluation, judge)
        refused = gate.refusals(written, disobedient)
        if refused and not accept and variants is not None:
            raise GateRefused(
                "; ".join(refused.values()), "accept it explicitly to ship it all the same"
            )
        left_out = set() if accept else set(refused)
        for unwanted in left_out | {REFERENCE} - set(chosen):
            shutil.rmtree(folder / unwanted)
        written = [v for v in written if v.name in set(chosen) - left_out]

        say("recording goldens")
        manifest = writer.write_manifest(written)
        written = [replace(v, peak_rss_mb=round(memory_estimate(manifest, v), 1)) for v in written]
        found = goldens(folder, written, source)
        provenance = _provenance(source, recipe, refused, accept) | {"quantisation": forms}
        return writer.write_manifest(written, found, provenance)


def _write(name: str, source: Checkpoint, precision: str | Precision, folder: Path) -> Variant:
    """precision: a name, or the int4 model."""
    target, place = VARIANTS[name], folder / name
    place.mkdir()
    if target.engine == "numba":
        per_token = write_panels(source, precision, place)
    elif isinstance(precision, str) and target.engine == "ctranslate2":
        per_token = write_ctranslate2(source, precision, place)
    else:
        per_token = write_graph(source, precision, place)
    size = sum(file.stat().st_size for file in place.iterdir())
    return Variant(name, target.engine, target.precision, name, size, per_token)


def _measured(
    variants: Sequence[Variant],
    source: Checkpoint,
    facts: Decoder,
    folder: Path,
    scored: Sequence[Scored],
) -> list[Variant]:
    """The variants with their fidelity; the reference, the first, has none."""
    reference = gate.onnx_logits(folder / REFERENCE, source.decoder)
    measured = [variants[0]]
    for variant in variants[1:]:
        if variant.engine == "onnxruntime":
            logits = gate.onnx_logits(folder / variant.path, source.decoder)
        elif variant.engine == "numba":
            logits = gate.numba_logits(folder / variant.path, facts)
        else:
            logits = gate.ctranslate2_logits(folder / variant.path, variant.precision)
        figures = gate.measure(logits, reference, scored, len(source.tokens))
        measured.append(replace(variant, fidelity=figures.as_dict()))
    return measured


def _answered(
    variants: Sequence[Variant],
    source: Checkpoint,
    folder: Path,
    evaluation: Sequence[Example] | None,
    judge: Judge | None,
) -> tuple[list[Variant], dict[str, list[str]]]:
    """The variants with their adherence, and what falls behind the first, by name."""
    if evaluation is None:
        tokens = source.decoder.positions // 2
        own = commanded_requests(source, EXAMPLES, tokens)
        asked = [(one.request, one.command) for one in own]
    else:
        asked = [(e.request, Command(e.command.task, count_words(e.response))) for e in evaluation]
    requests = adherence.requests(source, asked, levelled=judge is not None)
    answers = [adherence.answer(folder, variant, requests, judge) for variant in variants]
    faults = {
        variant.name: adherence.faults(answers[0], found)
        for variant, found in zip(variants, answers, strict=True)
    }
    return [
        replace(variant, adherence=found.figures())
        for variant, found in zip(variants, answers, strict=True)
    ], faults


def _recipe(source: Checkpoint) -> dict[str, Any] | None:
    """Training leaves it there; other checkpoints have none. Raises CheckpointError."""
    file = source.path / "recipe.json"
    return read_json(file) if file.is_file() else None


def _provenance(
    source: Checkpoint, recipe: Mapping[str, Any] | None, refused: Mapping[str, str], accept: bool
) -> dict[str, Any]:
    return {
        "checkpoint": source.digests(),
        "recipe": recipe,
        "packages": {package: _version(package) for package in PACKAGES},
        "gate": {
            "budgets": {precision: asdict(b) for precision, b in gate.BUDGETS.items()},
            "adherence": adherence.ALLOWED,
            "accepted": list(refused.values()) if accept else [],
            "left_out": [] if accept else list(refused.values()),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
