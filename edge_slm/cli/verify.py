"""`edge-slm verify`: checks the files of a bundle, and its golden answers."""

from __future__ import annotations

from pathlib import Path

import click

from edge_slm.cli.console import emit_json, examples, json_option, note, say
from edge_slm.cli.options import bundle_argument
from edge_slm_runtime import verify as verify_files
from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.errors import EngineError, EngineNotInstalled, SelfTestFailed
from edge_slm_runtime.loading import load_variant
from edge_slm_runtime.selftest import golden_answers


@click.command(
    short_help="Check a bundle's files, and its answers.",
    epilog=examples("verify my-bundle", "verify my-bundle --goldens --json"),
)
@bundle_argument
@click.option("--goldens", is_flag=True, help="Also run each variant on its stored requests.")
@json_option
def verify(bundle: Path, goldens: bool, as_json: bool) -> None:
    """Check that every file of BUNDLE (by default the one shipped) is the one that its
    manifest lists.

    With --goldens also that every variant whose engine is installed gives the
    stored token ids; another CPU or engine version may rightly differ in a few.
    """
    manifest = verify_files(bundle)
    checked = {v.name: _run_goldens(bundle, manifest, v) for v in manifest.variants if goldens}
    size = sum(entry.size for entry in manifest.files.values())
    if as_json:
        emit_json(
            {
                "bundle": str(bundle),
                "digest": manifest.digest,
                "files": len(manifest.files),
                "bytes": size,
                "goldens": checked if goldens else None,
            }
        )
        return
    say(f"{manifest.name}: {len(manifest.files)} files, {size} bytes, {manifest.digest}")
    for name, count in checked.items():
        say(f"{name}: {_STATUS.get(count, f'{count} goldens match')}")


_STATUS = {None: "not tested: engine not installed", 0: "not tested: it has no goldens"}


def _run_goldens(bundle: Path, manifest: Manifest, variant: Variant) -> int | None:
    """The number of goldens, which all match; None when the engine is not installed."""
    name = variant.name
    count = 0
    try:
        with load_variant(bundle, manifest, variant) as slm:
            for golden, got in golden_answers(slm):
                count += 1
                if got != golden.ids[name]:
                    raise SelfTestFailed(
                        f"{name} no longer gives its golden tokens for {golden.request!r}",
                        "the files are unaltered: look at the engine's version and the CPU",
                    )
    except EngineNotInstalled as error:
        note(f"{name} skipped: {error}")
        return None
    except EngineError as error:
        raise SelfTestFailed(f"{name} cannot run here: {error.problem}") from None
    return count
