"""`edge-slm install`, `rollback`, `prune`, `pack`, `sign` and `trust`: models of a device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from edge_slm.cli.console import emit_json, examples, json_option, reporter, say
from edge_slm.cli.options import bundle_type, folder, names
from edge_slm_runtime.errors import BadSetting
from edge_slm_runtime.files import write_aside
from edge_slm_runtime.store import Store

_key = click.option(
    "--trusted-key",
    "trusted_keys",
    multiple=True,
    metavar="HEX",
    help="Public key that must have signed it, besides those of 'trust'; repeatable.",
)


@click.command(
    short_help="Install a model, after a test on this device.",
    epilog=examples(
        "install ./my-bundle", "install https://example.org/prompts-115m.tar.zst --digest 3f9a…"
    ),
)
@click.argument("source")
@click.option("--name", help="To load the model by.  [default: the bundle's]")
@click.option("--digest", metavar="HEX", help="Install only the bundle of this digest.")
@_key
@click.option("--max-ms-per-token", type=float, help="Refuse it when it is slower here.")
@click.option("--max-memory-mb", type=float, help="Refuse it when it takes more here.")
@click.option("--allow-downgrade", is_flag=True, help="Also an older version than the installed.")
@json_option
def install(
    *,
    source: str,
    name: str | None,
    digest: str | None,
    trusted_keys: tuple[str, ...],
    max_ms_per_token: float | None,
    max_memory_mb: float | None,
    allow_downgrade: bool,
    as_json: bool,
) -> None:
    """Install the bundle SOURCE: a folder, a file of 'pack', an http(s) address of either, or
    OWNER/NAME on the hub.

    It is copied, verified and tested: every variant whose engine is installed answers the
    bundle's golden requests in a process of its own. Then it becomes current, at once and
    whole; whatever fails before leaves the present model in place. A model that fails to load
    three times is given up for the one before it.
    """
    from edge_slm.sources import fetched

    store = Store()
    with reporter() as report, fetched(source, store.root / "downloads", report) as bundle:
        report("self-test", 0, 1, "")
        installed, tests = store.install(
            bundle,
            name,
            trusted_keys=trusted_keys,
            expected_digest=digest,
            allow_downgrade=allow_downgrade,
            max_ms_per_token=max_ms_per_token,
            max_memory_mb=max_memory_mb,
        )
        report("self-test", 1, 1, "")
    if as_json:
        emit_json({**asdict(installed), "tests": [asdict(test) for test in tests]})
        return
    release = installed.current
    say(f"{installed.name} is installed: version {release.version}, digest {release.digest}")
    for test in tests:
        say(
            f"{test.variant}: {test.matched} of {test.goldens} goldens, "
            f"{test.ms_per_token:.2f} ms/token, peak RSS {test.peak_rss_mb:.0f} MiB"
        )


@click.command(
    short_help="Return to the release before the current one.",
    epilog=examples("rollback prompts-115m"),
)
@click.argument("name")
@json_option
def rollback(name: str, as_json: bool) -> None:
    """Make the previous release of the installed model NAME the current one."""
    installed = Store().rollback(name)
    if as_json:
        emit_json(asdict(installed))
    else:
        say(f"{name} is version {installed.current.version}, digest {installed.current.digest}")


@click.command(
    short_help="Remove releases that nothing refers to.",
    epilog=examples("prune", "prune --remove prompts-115m"),
)
@click.option("--remove", metavar="NAME", help="First forget this installed model.")
@json_option
def prune(remove: str | None, as_json: bool) -> None:
    """Remove bundles that are neither the current nor the previous release of a model."""
    store = Store()
    if remove:
        store.remove(remove)
    removed = store.prune()
    if as_json:
        emit_json({"removed": removed})
    else:
        say(f"{len(removed)} removed" + "".join(f"\n{digest}" for digest in removed))


@click.command(
    short_help="Make a bundle one file.",
    epilog=examples("pack my-bundle my-bundle.tar.zst --variants onnx-int8"),
)
@click.argument("bundle", type=bundle_type)
@click.argument("out", type=folder)
@click.option("--variants", type=names, help="Comma-separated, to keep.  [default: all]")
@json_option
def pack(bundle: Path, out: Path, variants: tuple[str, ...] | None, as_json: bool) -> None:
    """Write BUNDLE as the file OUT, which ends in .zip or .tar.zst.

    With --variants it has another manifest: another digest, and no signature until it is signed.
    """
    from edge_slm.archive import pack as write

    with TemporaryDirectory(prefix="edge-slm-") as scratch:
        if variants:
            from edge_slm_converters.distribution import write_reduced

            bundle = write_reduced(bundle, Path(scratch) / "bundle", variants)
        manifest = write(bundle, out)
    if as_json:
        emit_json({"written": str(out), "digest": manifest.digest, "bytes": out.stat().st_size})
    else:
        say(f"{out}: {out.stat().st_size} bytes, digest {manifest.digest}")


@click.command(
    short_help="Sign a bundle, or make a key to sign with.",
    epilog=examples(
        "sign --new-key --key release.key", "sign my-bundle --key release.key --version 3"
    ),
)
@click.argument("bundle", type=bundle_type, required=False)
@click.option("--key", type=folder, required=True, help="File of the private key, in hex.")
@click.option("--new-key", is_flag=True, help="Make the file --key, and print the public key.")
@click.option("--version", type=click.IntRange(min=1), help="Number the release first.")
@json_option
def sign(bundle: Path | None, key: Path, new_key: bool, version: int | None, as_json: bool) -> None:
    """Sign BUNDLE with the Ed25519 key in a file; several keys may sign it.

    --new-key prints the public key, for 'trust'.
    """
    from edge_slm_runtime import signatures

    if new_key:
        private, public = signatures.new_key()
        with write_aside(key, replace=False, mode=0o600) as aside:
            aside.write_text(f"{private}\n", "ascii")
    else:
        public = ""
    if bundle is not None:
        from edge_slm_converters.bundle_writer import set_version
        from edge_slm_runtime import verify

        manifest = verify(bundle)
        if version is not None:
            manifest = set_version(bundle, manifest, version)
        public = signatures.sign(bundle, manifest, _private(key))
    elif not new_key:
        raise BadSetting("nothing is to be done", "give BUNDLE or --new-key")
    if as_json:
        emit_json({"public_key": public})
    else:
        say(public)


@click.command(
    short_help="Install only models that are signed by these keys.",
    epilog=examples("trust 5f0c…", "trust"),
)
@click.argument("keys", nargs=-1, metavar="[HEX]...")
@json_option
def trust(keys: tuple[str, ...], as_json: bool) -> None:
    """From now on install only models that one of these public keys has signed; without keys,
    models of anyone.

    To change keys, sign releases with both for a while, and trust both.
    """
    from edge_slm_runtime.signatures import check_key

    for key in keys:
        check_key(key)
    store = Store()
    store.trust(keys)
    if as_json:
        emit_json({"trusted_keys": list(keys), "store": str(store.root)})
    else:
        say(f"{len(keys)} keys trusted" if keys else "models of anyone are installed")


def _private(key: Path) -> str:
    try:
        return key.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"{key} cannot be read: {error}", "edge-slm sign --new-key") from None
