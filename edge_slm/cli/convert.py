"""`edge-slm convert`: from a checkpoint to a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_slm.cli.console import (
    emit_json,
    examples,
    human_bytes,
    json_option,
    note,
    progress_bar,
    say,
    warn,
)
from edge_slm.cli.options import folder, names
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import DataError, DependencyMissing
from edge_slm_runtime.prompt import PromptForm

if TYPE_CHECKING:
    from edge_slm_bench.metrics.examples import Example
    from edge_slm_converters.adherence import AnswerJudge
    from edge_slm_converters.checkpoint import Checkpoint
    from edge_slm_runtime.bundle import Manifest, Variant
    from edge_slm_runtime.deltas import Delta


@click.command(
    short_help="Convert a checkpoint to a bundle.",
    epilog=examples(
        "convert models/reference my-bundle",
        "convert models/base my-bundle --adapter my-lora",
        "convert SmolLM2-135M-Instruct.Q4_1.gguf my-chat --variants onnx-int8 --accept",
    ),
)
@click.argument("checkpoint", type=folder)
@click.argument("out", type=folder)
@click.option(
    "--variants",
    type=names,
    help="Comma-separated, of onnx-fp32, onnx-int8, onnx-int4, numba-int8, numba-int4, "
    "ctranslate2-int8, ctranslate2-float32.  [default: all but the last, of the engines installed]",
)
@click.option("--name", help="Name of the bundle.  [default: that of the folder]")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Samples as in training: fidelity and adherence are measured on their held-out pairs.  "
    "[default: the fp32 model's own answers to built-in requests]",
)
@click.option(
    "--prompt",
    metavar="FORM",
    help="Prompt form of a model that knows no commands: chatml, llama3, zephyr or plain.  "
    "[default: recognised by its chat template; without one, plain]",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Longest prompt and answer together, in tokens: what memory is needed for.  "
    "[default: what the model has]",
)
@click.option(
    "--adapter",
    "adapters",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Adapter to merge into the weights first: a LoRA folder of Hugging Face's peft, or a file "
    "of 'edge-slm adapter'; repeatable.",
)
@click.option(
    "--side-adapter",
    "side_adapters",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Adapter to keep in the bundle beside the weights, for requests of its task or that name "
    "it (engine numba alone); repeatable.",
)
@click.option("--accept", is_flag=True, help="Ship variants outside their budget too.")
@json_option
def convert(
    *,
    checkpoint: Path,
    out: Path,
    variants: tuple[str, ...] | None,
    name: str | None,
    data: tuple[Path, ...],
    prompt: str | None,
    context: int | None,
    adapters: tuple[Path, ...],
    side_adapters: tuple[Path, ...],
    accept: bool,
    as_json: bool,
) -> None:
    """Convert CHECKPOINT, a Hugging Face folder or a GGUF file, to the bundle folder OUT.

    GPT-2 and the Llama family can be converted.

    Each variant's predictions and its obedience are measured against fp32. Without --variants those
    outside their budget are left out with a warning; one asked for by name is refused
    (exit 7) unless --accept. OUT appears whole or not at all.
    """
    from edge_slm_converters import read_checkpoint
    from edge_slm_converters.convert import chosen_variants
    from edge_slm_converters.deltas import merged, read_adapter

    chosen_variants(variants)  # before the data is read, which may take long
    source = read_checkpoint(checkpoint, prompt, context)
    source = merged(source, [read_adapter(path, source) for path in adapters])
    beside = [read_adapter(path, source) for path in side_adapters]
    evaluation = held_out_examples(source, data) if data else None
    judge = judge_of(source, data) if data else None
    manifest = convert_with_bar(
        source,
        out,
        variants,
        name=name,
        evaluation=evaluation,
        judge=judge,
        accept=accept,
        adapters=beside,
    )
    for figures in manifest.provenance["gate"]["undecided"]:
        note(f"kept, as chance may have put it outside its budget: {figures}")
    for figures in manifest.provenance["gate"]["left_out"]:
        warn(f"left out, outside its budget: {figures}")
    if as_json:
        emit_json(manifest.to_json())
        return
    for variant in manifest.variants:
        click.echo(f"{variant.name}: {human_bytes(variant.bytes)}{_measured(variant)}")
    say(f"{out}: {manifest.digest}")


def convert_with_bar(
    checkpoint: Path | Checkpoint,
    out: Path,
    variants: Sequence[str] | None,
    *,
    name: str | None = None,
    evaluation: Sequence[Example] | None = None,
    judge: AnswerJudge | None = None,
    accept: bool = False,
    adapters: Sequence[Delta] = (),
) -> Manifest:
    """`edge_slm_converters.convert` with a progress bar on stderr."""
    from edge_slm_converters.convert import convert as run

    with progress_bar() as progress:
        task = progress.add_task("converting", total=100)

        def step(line: str, done: float) -> None:
            progress.update(task, description=line, completed=round(100 * done))

        return run(
            checkpoint,
            out,
            variants,
            name=name,
            evaluation=evaluation,
            judge=judge,
            accept=accept,
            adapters=adapters,
            progress=step,
        )


def held_out_examples(checkpoint: Checkpoint, data: Sequence[Path]) -> list[Example]:
    """About 30 held-out pairs per task, or 100 for a model without commands. Raises DataError
    when a commanded model's recipe does not say what was held out."""
    schema = checkpoint.form.schema
    if schema is None:
        return held_out(data, checkpoint.form, None, 100)
    try:
        recipe = json.loads((checkpoint.path / "recipe.json").read_text("utf-8"))
        return held_out(data, checkpoint.form, recipe, 30 * len(schema.tasks))
    except (OSError, ValueError, KeyError):
        raise DataError(
            f"{checkpoint.path} has no recipe.json that says what was held out", "leave --data out"
        ) from None


def held_out(
    data: Sequence[Path], form: PromptForm, recipe: Mapping[str, Any] | None, count: int
) -> list[Example]:
    """`count` pairs that training by `recipe` (recipe.json of a checkpoint) held out, or that
    a default recipe would; each with its task and length as the command, if the form of
    prompts has commands. Raises KeyError when the recipe lacks what was held out."""
    from edge_slm.distill.samples import held_out_samples
    from edge_slm.distill.split import HOLDOUT_PERCENT, Reading
    from edge_slm_bench.metrics.examples import Example

    facts = recipe["recipe"]["data"] if recipe else {"holdout_percent": HOLDOUT_PERCENT}
    tasks = form.schema.tasks if form.schema else None
    return [
        Example(s.request, Command(s.task if tasks else None, s.words), s.response)
        for s in held_out_samples(data, tasks, count, Reading.of(facts))
    ]


def judge_of(checkpoint: Checkpoint, data: Sequence[Path]) -> AnswerJudge | None:
    """A judge of relevance and tasks, from the training side of `data`; None for a model
    without commands, and, with a warning, when its packages are not installed."""
    if checkpoint.form.schema is None:
        return None
    from edge_slm.distill.evaluate.scorers import TextJudge
    from edge_slm.distill.samples import divide, read_samples
    from edge_slm.distill.split import Reading

    recipe = json.loads((checkpoint.path / "recipe.json").read_text("utf-8"))
    reading = Reading.of(recipe["recipe"]["data"])
    pairs = [sample for sample in read_samples(data, reading=reading) if sample.request]
    train, _ = divide(pairs, reading.holdout_percent)
    try:
        return TextJudge(train, checkpoint.form.grammar.tasks)
    except DependencyMissing as error:
        warn(f"adherence is measured of lengths alone: {error}")
        return None


def _measured(variant: Variant) -> str:
    text = ""
    if variant.fidelity is not None:
        text = (
            ", top-1 {top1:.2%}, perplexity ratio {perplexity_ratio:.4f}, mean KL {kl_mean:.5f} "
            "over {positions} positions".format(**variant.fidelity)
        )
    if variant.adherence is None:
        return text
    names = {
        "within": "{:.1%} in tolerance",
        "length_mae": "off by {:.2f} words",
        "relevance": "relevance {:.3f}",
        "task_accuracy": "task {:.1%}",
    }
    parts = [
        form.format(variant.adherence[name])
        for name, form in names.items()
        if name in variant.adherence
    ]
    return f"{text}; {variant.adherence['answers']:.0f} answers: {', '.join(parts)}"
