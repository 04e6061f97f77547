"""`edge-slm package`: from a bundle to a distribution that pip installs."""

from __future__ import annotations

from pathlib import Path

import click

from edge_slm.cli.console import emit_json, examples, json_option, say
from edge_slm.cli.options import bundle_type, folder, names
from edge_slm_runtime.errors import DataError

_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    short_help="Make a bundle a package that pip installs.",
    epilog=examples("package my-bundle models/my-model --license MIT"),
)
@click.argument("bundle", type=bundle_type)
@click.argument("out", type=folder)
@click.option("--license", required=True, metavar="SPDX", help="Such as Apache-2.0.")
@click.option(
    "--license-file", "license_files", type=_file, multiple=True, help="To copy; repeatable."
)
@click.option("--name", help="To load the model by.  [default: the bundle's]")
@click.option("--version", default="0.1.0", show_default=True)
@click.option("--variants", type=names, help="Comma-separated, to keep.  [default: all]")
@click.option(
    "--card",
    type=_file,
    help="Markdown for the model card: base model, data, licences, evaluation, failures.",
)
@json_option
def package(
    *,
    bundle: Path,
    out: Path,
    license: str,  # noqa: A002
    license_files: tuple[Path, ...],
    name: str | None,
    version: str,
    variants: tuple[str, ...] | None,
    card: Path | None,
    as_json: bool,
) -> None:
    """Make BUNDLE the Python package OUT, which holds its files, a model card and the licence.

    After 'pip install ./OUT' the model is loaded by its name: edge_slm.load("NAME"). OUT
    appears whole or not at all.
    """
    from edge_slm_converters.distribution import write_distribution

    manifest = write_distribution(
        bundle,
        out,
        license=license,
        license_files=license_files,
        name=name,
        version=version,
        variants=variants,
        card=_text(card) if card else "",
    )
    if as_json:
        emit_json(manifest.to_json())
    else:
        say(f"{out}: {manifest.name} {version}, {manifest.digest}")


def _text(path: Path) -> str:
    """Raises DataError."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid UTF-8 at byte {error.start}") from None
