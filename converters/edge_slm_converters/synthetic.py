"""Random-initialised checkpoints of any shape and architecture, written without torch.

For measuring: speed and memory depend on the shape of a model, not on its
weights. `python -m edge_slm_converters.synthetic OUT --like models/reference`
writes the 98M shape (12 layers × 768, vocabulary 16384).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from edge_slm_converters.arrays import Float32
from edge_slm_converters.hugging_face import write_weights
from edge_slm_runtime.decoder import Decoder, gpt2
from edge_slm_runtime.errors import CheckpointError, EdgeSlmError
from edge_slm_runtime.files import write_folder_aside

# Traits of a Decoder that differ from those of a GPT-2 of the same shape.
TRAITS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {},
    "llama": {
        "norm": "rms",
        "position": "rotary",
        "rope_theta": 10000.0,
        "mlp": "gated",
        "activation": "silu",
    },
}


def random_checkpoint(
    path: str | Path,
    *,
    layers: int,
    width: int,
    heads: int,
    vocab_size: int,
    positions: int,
    like: str | Path,
    architecture: str = "gpt2",
    seed: int = 0,
    std: float = 0.02,
    **traits: Any,
) -> Path:
    """Writes a checkpoint folder with the tokenizer and command schema of `like`.

    architecture: a key of TRAITS. traits: other fields of its Decoder, such as kv_heads,
    head_width, inner, tied.

    Weights are normal with standard deviation `std` (GPT-2's own 0.02 by default),
    stored as float16; norms are 1 and biases 0. A `vocab_size` above the
    tokenizer's is padding. Raises TargetExists,
    CheckpointError, DependencyMissing.
    """
    copied = [Path(like) / name for name in ("tokenizer.json", "command.json")]
    if missing := [str(file) for file in copied if not file.is_file()]:
        raise CheckpointError(f"{missing[0]} is missing", "give a checkpoint folder as `like`")
    decoder = _decoder(
        architecture,
        layers=layers,
        width=width,
        heads=heads,
        vocab_size=vocab_size,
        positions=positions,
        **traits,
    )
    with write_folder_aside(Path(path)) as folder:
        write_weights(folder, decoder, _random_tensors(decoder, seed, std), np.float16)
        for file in copied:
            shutil.copyfile(file, folder / file.name)
    return Path(path)


def _decoder(architecture: str, **shape: Any) -> Decoder:
    """Raises CheckpointError for an architecture without TRAITS, or sizes that do not fit."""
    if architecture not in TRAITS:
        raise CheckpointError(f"no traits of {architecture!r}", f"known: {', '.join(TRAITS)}")
    shape = {name: value for name, value in shape.items() if value is not None}
    shape = {**TRAITS[architecture], "architecture": architecture} | shape
    if "head_width" in shape:
        shape["attention_scale"] = (shape["head_width"] ** -0.5,) * shape["layers"]
    decoder = gpt2(**shape)
    try:
        decoder.check()
    except ValueError as error:
        raise CheckpointError(f"no model has this shape: {error}") from None
    return decoder


def _random_tensors(decoder: Decoder, seed: int, std: float) -> dict[str, Float32]:
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in decoder.shapes().items():
        if "norm." in name or name.endswith(".bias"):
            tensors[name] = np.full(shape, float(name.endswith("weight")), np.float32)
        else:
            tensors[name] = generator.standard_normal(shape, np.float32) * np.float32(std)
    return tensors


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--like", type=click.Path(path_type=Path), required=True, help="A checkpoint folder.")
@click.option("--layers", type=int, default=12, show_default=True)
@click.option("--width", type=int, default=768, show_default=True)
@click.option("--heads", type=int, default=12, show_default=True)
@click.option("--vocab-size", type=int, default=16384, show_default=True)
@click.option("--positions", type=int, default=512, show_default=True)
@click.option("--architecture", type=click.Choice([*TRAITS]), default="gpt2", show_default=True)
@click.option("--kv-heads", type=int, help="[default: as many as heads]")
@click.option("--head-width", type=int, help="[default: width / heads]")
@click.option("--inner", type=int, help="Width of the feed-forward layer.  [default: 4 × width]")
def main(out: Path, **shape: Any) -> None:
    """Write a random-initialised checkpoint with the tokenizer and commands of --like."""
    try:
        click.echo(random_checkpoint(out, **shape))
    except EdgeSlmError as error:
        click.echo(f"error[{error.code}]: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
