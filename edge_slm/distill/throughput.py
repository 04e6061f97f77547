"""Training speed of a recipe on this machine: `python -m edge_slm.distill.throughput RECIPE`.

Real training steps (`Trainer.step`, optimizer included) on generated records; no data is
needed. Model FLOP utilisation as PaLM defines it (arXiv 2204.02311, appendix B): the FLOPs
that the model needs, without those of recomputation, over the peak of the device.

FLOPs of a step = positions × (6·M + 12·L·A·T) + labelled × 6·V·d: M weights in the matrices
of L layers, attention heads of width A together over rows of T positions, and the LM head
where there is a label. Lookups of embeddings, biases, norms and the countdown heads are not
counted; padding is.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_slm_runtime.errors import DependencyMissing, EdgeSlmError

if TYPE_CHECKING:
    from edge_slm.distill.packing import Encoded
    from edge_slm.distill.recipe import Recipe
    from edge_slm.distill.trainer import Trainer
    from edge_slm_runtime.command import CommandSchema

# Dense bf16 TFLOP/s of data sheets (half of a figure "with sparsity"), by the name that the
# driver reports. Other devices are compared with their own matmul.
_PEAKS = {
    "NVIDIA H200": 989.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "NVIDIA A10": 125.0,
}
_WARM_UP = 3  # steps; torch.compile compiles in the first


def flops_per_step(recipe: Recipe, positions: int, labelled: int) -> float:
    """FLOPs of one optimizer step, forward and backward; see the docstring of the module."""
    d = recipe.model.decoder()
    weights = sum(inputs * outputs for inputs, outputs in d.matrices().values())
    layers = 6 * weights + 12 * d.layers * d.attention_width * d.positions
    return float(positions * layers + labelled * 6 * d.vocab_size * d.width)


def made_up_records(recipe: Recipe, schema: CommandSchema, count: int) -> list[Encoded]:
    """Records of random tokens: requests of 4 … 24, responses of 8 … 160."""
    from edge_slm.distill.hindsight import Record
    from edge_slm.distill.packing import Encoded
    from edge_slm_runtime.command import Command

    rng = random.Random(recipe.seed)
    first, last = len(schema.special_tokens()), recipe.model.vocab_size - 1
    room = recipe.model.positions - schema.overhead
    records = []
    for _ in range(count):
        request, response = (
            [rng.randint(first, last) for _ in range(min(rng.randint(*size), room // 2))]
            for size in ((4, 24), (8, 160))
        )
        words = range(len(response) + 1)  # a word per token
        command = Command(schema.tasks[0], len(response), 0)
        records.append(Encoded(request, [*response, 0], Record("", "", command), list(words)))
    return records


def measure(recipe: Recipe, steps: int = 20) -> dict[str, Any]:
    """The figures as JSON-ready data; `tokens_per_second` counts padding.

    Raises DependencyMissing, OutOfMemory.
    """
    try:
        import torch
        from accelerate import Accelerator
    except ImportError:
        raise DependencyMissing(
            "training needs torch and accelerate", "pip install 'edge-slm[train]'"
        ) from None
    from edge_slm.distill.precision import use_bf16

    t, accelerator = recipe.train, Accelerator()
    trainer = _trainer(recipe, steps + _WARM_UP, accelerator)
    batches, seconds, labelled, filled = trainer.batches(), [], 0, 0
    for number in range(steps + _WARM_UP):
        batch = next(batches)
        started = time.perf_counter()
        trainer.step(batch)  # reads the loss, so it waits for the device
        if number >= _WARM_UP:
            seconds.append(time.perf_counter() - started)
            labelled += batch.loss_tokens
            filled += int((batch.segment >= 0).sum())
    batches.close()  # type: ignore[attr-defined]  # a generator
    on_gpu = accelerator.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    bf16 = use_bf16(t.precision)
    precision = "bf16" if bf16 else "fp32"
    listed = _PEAKS.get(name) if bf16 else None
    peak = listed or _matmul_peak(accelerator.device, bf16)
    median = statistics.median(seconds)
    flops = flops_per_step(recipe, trainer.tokens_per_step, round(labelled / steps))
    return {
        "recipe": recipe.name,
        "device": name,
        "precision": precision,
        "compile": t.compile,
        "parameters": sum(p.numel() for p in trainer.plain.lm.parameters()),
        "tokens_per_step": trainer.tokens_per_step,
        "steps": steps,
        "seconds_per_step": median,
        "slowest_step": max(seconds),
        "tokens_per_second": trainer.tokens_per_step / median,
        "filled": filled / (steps * trainer.tokens_per_step),
        "tflops": flops / median / 1e12,
        "peak_tflops": peak,
        "peak": "data sheet, dense bf16" if listed else f"{precision} matmul measured here",
        "mfu": flops / median / 1e12 / peak,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def _trainer(recipe: Recipe, steps: int, accelerator: Any) -> Trainer:
    """Of a fresh model on generated records."""
    from edge_slm.distill.model import fresh_model
    from edge_slm.distill.objective import Learner
    from edge_slm.distill.trainer import Stage, Trainer
    from edge_slm_runtime.command import CommandSchema, default_axes

    t, h = recipe.train, recipe.hindsight
    schema = CommandSchema(default_axes(recipe.data.tasks, h.levels), position=h.position)
    records = made_up_records(recipe, schema, max(200, t.batch_tokens // 25))
    model = fresh_model(recipe.model, recipe.seed)
    if t.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learner = Learner(model, countdown=t.countdown, compile=t.compile)
    rate = recipe.stages[0].learning_rate
    stage = Stage("throughput", records, [], schema, t.batch_tokens * steps, rate, "")
    return Trainer(recipe, stage, learner, accelerator, None)


def _matmul_peak(device: Any, bf16: bool) -> float:
    """TFLOP/s of the best of several square matrix products."""
    import torch

    from edge_slm.distill.precision import seconds_of_product

    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if bf16 else torch.float32
    return 2 * size**3 / seconds_of_product(dtype, size, device) / 1e12


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--batch-tokens", type=int, help="Instead of the recipe's, for a small device.")
@click.option("--json", "as_json", is_flag=True, help="All figures as JSON.")
def main(*, recipe: Path, steps: int, batch_tokens: int | None, as_json: bool) -> None:
    """Tokens per second and model FLOP utilisation of RECIPE's training step here."""
    from edge_slm.distill.recipe import Recipe

    try:
        settings = Recipe.read(recipe)
        if batch_tokens:
            change = {"batch_tokens": max(batch_tokens, settings.model.positions)}
            settings = settings.model_copy(
                update={"train": settings.train.model_copy(update=change)}
            )
        result = measure(settings, steps)
    except EdgeSlmError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(
        f"{result['recipe']}, {result['parameters'] / 1e6:.1f}M parameters, {result['device']}, "
        f"{result['precision']}\n"
        f"{result['tokens_per_second']:,.0f} tokens/s ({result['filled']:.0%} of them records), "
        f"{result['seconds_per_step']:.3f} s a step of {result['tokens_per_step']} tokens\n"
        f"{result['tflops']:.3g} TFLOP/s, MFU {result['mfu']:.1%} of {result['peak_tflops']:.3g} "
        f"({result['peak']})"
    )


if __name__ == "__main__":
    main()
