"""`edge-slm adapter`: from a LoRA folder to the file of an adapter."""

from __future__ import annotations

from pathlib import Path

import click

from edge_slm.cli.console import examples, human_bytes, say
from edge_slm.cli.options import folder
from edge_slm_runtime.files import write_aside


@click.command(
    short_help="Write a LoRA folder of peft as one small file.",
    epilog=examples(
        "adapter my-lora title.safetensors --base models/base --task title",
        "convert models/base my-bundle --adapter title.safetensors",
    ),
)
@click.argument("lora", type=folder)
@click.argument("out", type=folder)
@click.option("--base", type=folder, required=True, help="Checkpoint that it was trained on.")
@click.option("--name", default="", help="Of the adapter.  [default: that of the folder]")
@click.option("--task", default="", help="Whose requests it is for.  [default: none]")
def adapter(*, lora: Path, out: Path, base: Path, name: str, task: str) -> None:
    """Write LORA, a folder that Hugging Face's peft saved, as the file OUT: its factors in half
    precision, and the digest of the weights that it is for. It is refused for any others."""
    from edge_slm_converters import read_checkpoint
    from edge_slm_converters.deltas import read_adapter

    delta = read_adapter(lora, read_checkpoint(base), name, task)
    with write_aside(out, replace=False) as aside:
        aside.write_bytes(delta.to_bytes())
    say(f"{out}: {delta.name}, rank {delta.rank}, {human_bytes(out.stat().st_size)}")
