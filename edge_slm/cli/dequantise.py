"""`edge-slm dequantise`: from a bundle back to a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from edge_slm.cli.console import examples, say
from edge_slm.cli.options import bundle_type, folder


@click.command(
    short_help="Write the checkpoint that a bundle computes with.",
    epilog=examples(
        "dequantise prompts-115m runs/m",
        "convert runs/m my-bundle --variants numba-int4 --accept",
    ),
)
@click.argument("bundle", type=bundle_type)
@click.argument("out", type=folder)
def dequantise(*, bundle: Path, out: Path) -> None:
    """Write the folder OUT in the Hugging Face layout: the weights that BUNDLE's ONNX variant with
    most bits computes with, as they are after quantising.

    To train the model further (distill --init), let it teach (--teacher-checkpoint), or
    convert it for another engine.
    """
    from edge_slm_converters.dequantise import write_checkpoint_of

    variant = write_checkpoint_of(bundle, out)
    say(f"{out}: the weights of {variant.name}")
