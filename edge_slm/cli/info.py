"""`edge-slm info`: contents of a bundle, or the installed models."""

from __future__ import annotations

from pathlib import Path

import click

import edge_slm
from edge_slm.cli.console import emit_json, examples, human_bytes, json_option, stdout_console
from edge_slm.cli.options import bundle_type
from edge_slm_runtime.bundle import Manifest, read_manifest
from edge_slm_runtime.description import model_facts


@click.command(
    short_help="Show what a bundle holds, or list the installed models.",
    epilog=examples("info", "info my-bundle --json"),
)
@click.argument("bundle", type=bundle_type, required=False)
@json_option
def info(bundle: Path | None, as_json: bool) -> None:
    """Show the model, the commands and the variants of BUNDLE.

    Without BUNDLE, list the models that are installed: the one that comes with the
    package, then those that can be given by their name wherever a bundle is asked for.
    Only manifests are read; 'verify' reads all the files.
    """
    if bundle is None:
        _list(as_json)
        return
    manifest = read_manifest(bundle)
    if as_json:
        emit_json(manifest.to_json())
    else:
        _print(manifest)


def _list(as_json: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    places: dict[str | None, Path] = {None: edge_slm.shipped_bundle()}
    places.update(edge_slm.installed_models())
    models = [(name, path, read_manifest(path)) for name, path in places.items()]
    if as_json:
        emit_json(
            [
                {
                    "name": name,
                    "path": str(path),
                    "parameters": manifest.parameters,
                    "variants": [variant.name for variant in manifest.variants],
                    "digest": manifest.digest,
                }
                for name, path, manifest in models
            ]
        )
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("name", "parameters", "variants", "path"):
        table.add_column(heading, overflow="fold")
    for name, path, manifest in models:
        table.add_row(
            "(shipped)" if name is None else escape(name),
            f"{manifest.parameters / 1e6:.1f} M",
            escape(", ".join(variant.name for variant in manifest.variants)),
            escape(str(path)),
        )
    stdout_console().print(table)


def _print(manifest: Manifest) -> None:
    from rich.markup import escape
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    for name, value in (
        *model_facts(manifest),
        ("goldens", str(len(manifest.goldens))),
        ("digest", manifest.digest),
    ):
        facts.add_row(f"[bold]{name}[/bold]", escape(value))
    variants = Table(box=None, header_style="bold", pad_edge=False)
    variants.add_column("variant")
    variants.add_column("engine")
    variants.add_column("precision")
    for heading in ("size", "read per token", "top-1 agreement", "mean KL", "perplexity ratio"):
        variants.add_column(heading, justify="right")
    for v in manifest.variants:
        fidelity = v.fidelity or {}
        variants.add_row(
            escape(v.name),
            v.engine,
            v.precision,
            human_bytes(v.bytes),
            human_bytes(v.weight_bytes_per_token),
            f"{fidelity['top1']:.1%}" if "top1" in fidelity else "–",
            f"{fidelity['kl_mean']:.5f}" if "kl_mean" in fidelity else "–",
            f"{fidelity['perplexity_ratio']:.4f}" if "perplexity_ratio" in fidelity else "–",
        )
    console = stdout_console()
    console.print(facts)
    console.print()
    console.print(variants)
