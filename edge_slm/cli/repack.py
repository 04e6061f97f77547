"""`edge-slm repack`: a bundle for the numba engine too."""

from __future__ import annotations

from pathlib import Path

import click

from edge_slm.cli.console import examples, human_bytes, say
from edge_slm.cli.options import bundle_type, folder


@click.command(
    short_help="Add a bundle's weights for the numba engine.",
    epilog=examples("repack prompts-115m my-bundle"),
)
@click.argument("bundle", type=bundle_type)
@click.argument("out", type=folder)
def repack(*, bundle: Path, out: Path) -> None:
    """Write the bundle folder OUT: BUNDLE, and beside each of its ONNX variants of 8 or 4 bits
    the same weights as the numba engine reads them.

    For models that come with ONNX alone, which numba runs about twice as fast (pip install
    'edge-slm[numba,convert]'). Nothing is quantised again; it takes seconds.
    """
    from edge_slm_converters.repack import repack as run

    manifest = run(bundle, out)
    for variant in manifest.variants:
        click.echo(f"{variant.name}: {human_bytes(variant.bytes)}")
    say(f"{out}: {manifest.digest}")
