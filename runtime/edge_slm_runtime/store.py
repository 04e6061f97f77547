"""The installed models of a device: every release whole, one of them current, the last one kept.

    ROOT/bundles/DIGEST/       bundles, by the digest of their manifest; never changed
    ROOT/models/NAME.json      which of them is current, and which was before it
    ROOT/policy.json           keys that bundles must be signed by, if there are any

A release is copied, verified, self-tested on the device, and only then made current, by the
rename of one small file; a crash or power loss at any instant leaves the old or the new model.
A release that cannot be loaded is given up for the one before it, as phones do with their
systems: until its first successful load every load is counted before it begins, so that
one which takes the process down counts too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_slm_runtime.errors import (
    BundleError,
    BundleNotFound,
    DowngradeRefused,
    EdgeSlmError,
    EngineNotInstalled,
    OutOfMemory,
    RequestError,
    StoreNotWritable,
    shown,
)
from edge_slm_runtime.files import lock, reading, write_folder_aside, write_json

if TYPE_CHECKING:
    from edge_slm_runtime.selftest import VariantTest

ATTEMPTS = 3  # loads of a new release without a success, after which it is given up
_NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class Release:
    """A bundle of the store. attempts: loads that were begun; confirmed: one succeeded."""

    digest: str
    version: int = 0
    attempts: int = 0
    confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Installed:
    """The releases of a name."""

    name: str
    current: Release
    previous: Release | None = None


def store_root() -> Path:
    """Of this user: $EDGE_SLM_HOME, or `edge-slm` where the platform keeps data of programs."""
    if home := os.environ.get("EDGE_SLM_HOME"):
        return Path(home).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "edge-slm"
    variable, usual = ("LOCALAPPDATA", "AppData/Local")
    if sys.platform != "win32":
        variable, usual = ("XDG_DATA_HOME", ".local/share")
    given = Path(os.environ.get(variable) or "")  # the XDG specification: ignore relative ones
    return (given if given.is_absolute() else Path.home() / usual) / "edge-slm"


class Store:
    """The store at `root`, which need not exist yet; by default that of the user."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root).absolute() if root is not None else store_root()

    # -- reading ----------------------------------------------------------------

    def installed(self) -> dict[str, Installed]:
        """What is installed, by name, sorted."""
        files = sorted((self.root / "models").glob("*.json"))
        found = (self.get(file.stem) for file in files if _NAME.fullmatch(file.stem))
        return {one.name: one for one in found if one is not None}

    def get(self, name: str) -> Installed | None:
        """The releases of a name, or None. Raises BundleError when its file is damaged."""
        if not _NAME.fullmatch(name):
            return None
        path = self._state(name)
        with reading(path):
            try:
                data = json.loads(path.read_text("utf-8"))
                previous = data["previous"]
                return Installed(
                    name,
                    Release(**data["current"]),
                    Release(**previous) if previous is not None else None,
                )
            except FileNotFoundError:
                return None
            except (ValueError, KeyError, TypeError, RecursionError):
                raise BundleError(f"{path} is damaged", "install the model again") from None

    def folder(self, release: Release) -> Path:
        """The bundle of a release."""
        return self.root / "bundles" / release.digest

    @property
    def trusted_keys(self) -> tuple[str, ...]:
        """Public keys, one of which every bundle must be signed by; none: no signature is asked
        for. Raises BundleError when the policy is damaged."""
        path = self.root / "policy.json"
        with reading(path):
            try:
                return tuple(map(str, json.loads(path.read_text("utf-8"))["trusted_keys"]))
            except FileNotFoundError:
                return ()
            except (ValueError, KeyError, TypeError, RecursionError):
                raise BundleError(f"{path} is damaged", "write it again: edge-slm trust") from None

    # -- changing ---------------------------------------------------------------

    def install(
        self,
        bundle: str | os.PathLike[str],
        name: str | None = None,
        *,
        trusted_keys: Sequence[str] = (),
        expected_digest: str | None = None,
        allow_downgrade: bool = False,
        **bounds: float | None,
    ) -> tuple[Installed, list[VariantTest]]:
        """Makes the bundle in a folder the current release of a name (by default its own), and
        returns that with the results of the self-test.

        trusted_keys: besides those of the policy. bounds: of `self_test`. Raises what `verify`
        and `check_trust` raise, DowngradeRefused, SelfTestFailed, StoreNotWritable, BundleError for
        a name that cannot be one; then what was current stays so.
        """
        # Not needed for loading, which imports this module.
        from edge_slm_runtime.integrity import verify
        from edge_slm_runtime.selftest import self_test
        from edge_slm_runtime.signatures import check_trust

        source = Path(bundle)
        manifest = verify(source)
        name = manifest.name if name is None else name
        if not _NAME.fullmatch(name):
            raise BundleError(
                f"{shown(name)} is no name of a model", "lower-case letters, digits, '.', '-', '_'"
            )
        check_trust(source, manifest, (*self.trusted_keys, *trusted_keys), expected_digest)
        release = Release(manifest.digest, manifest.version)
        with self._changing():
            self._refuse_downgrade(name, release, allow_downgrade)
            self._add(source, manifest.files, release)
        tests = self_test(self.folder(release), manifest, **bounds)
        with self._changing():
            before = self._refuse_downgrade(name, release, allow_downgrade)
            self._add(source, manifest.files, release)  # it may have been pruned meanwhile
            previous = before.current if before else None
            if before and before.current.digest == release.digest:
                previous = before.previous
            return self._write(Installed(name, release, previous)), tests

    def rollback(self, name: str) -> Installed:
        """Makes the previous release the current one; there is then no previous one.

        Raises BundleNotFound when there is none.
        """
        with self._changing():
            return self._roll_back(self._existing(name))

    def remove(self, name: str) -> None:
        """Forgets a name; `prune` removes its files. Raises BundleNotFound."""
        with self._changing():
            self._existing(name)
            self._state(name).unlink()

    def prune(self) -> list[str]:
        """Removes bundles that are neither current nor previous, and what killed processes left;
        returns the digests. A process that has loaded one goes on (POSIX)."""
        with self._changing():
            used = {
                release.digest
                for one in self.installed().values()
                for release in (one.current, one.previous)
                if release is not None
            }
            folder = self.root / "bundles"
            found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            unused = [digest for digest in found if digest not in used]
            for digest in unused:
                # Renamed first, so that what is left of a killed removal is no bundle.
                aside = folder / f".removed-{digest.lstrip('.')}"
                with suppress(OSError):
                    (folder / digest).rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
            return [digest for digest in unused if not digest.startswith(".")]

    def trust(self, keys: Sequence[str]) -> None:
        """Requires a signature by one of these public keys from now on; without keys, none."""
        with self._changing():
            write_json({"trusted_keys": list(keys)}, self.root / "policy.json")

    # -- loading ----------------------------------------------------------------

    @contextmanager
    def attempt(self, name: str) -> Iterator[Path]:
        """The folder of the current release while it is loaded.

        Loads of a release that none has succeeded with are counted; after `ATTEMPTS` of them
        the previous release takes its place, here and now. Raises BundleNotFound.
        """
        one = self._existing(name)
        if one.current.confirmed:
            yield self.folder(one.current)
            return
        with (
            suppress(StoreNotWritable),
            self._changing(),
        ):  # a store that others own is not written to
            one = self._existing(name)
            if one.current.attempts >= ATTEMPTS and one.previous is not None:
                from logging import getLogger

                one = self._roll_back(one)
                getLogger("edge_slm").warning(
                    "%s failed to load %d times; back to release %s",
                    name, ATTEMPTS, one.current.digest[:12],
                )  # fmt: skip
            elif not one.current.confirmed:
                begun = replace(one.current, attempts=one.current.attempts + 1)
                one = self._write(replace(one, current=begun))
        try:
            yield self.folder(one.current)
        except (RequestError, EngineNotInstalled, OutOfMemory):  # says nothing of the release
            self._note(one, attempts=max(0, one.current.attempts - 1))
            raise
        self._note(one, attempts=0, confirmed=True)

    def _note(self, one: Installed, **changes: Any) -> None:
        """Changes the current release, if it is still that of `one`."""
        with suppress(StoreNotWritable), self._changing():
            now = self.get(one.name)
            if now and now.current.digest == one.current.digest and not now.current.confirmed:
                self._write(replace(now, current=replace(now.current, **changes)))

    # -- files ------------------------------------------------------------------

    def _refuse_downgrade(self, name: str, release: Release, allowed: bool) -> Installed | None:
        """What is installed. Raises DowngradeRefused."""
        before = self.get(name)
        if before and release.version < before.current.version and not allowed:
            raise DowngradeRefused(
                f"version {release.version} of {name} is older than the installed "
                f"{before.current.version}",
                "install a newer one, or allow the downgrade",
            )
        return before

    def _existing(self, name: str) -> Installed:
        if (one := self.get(name)) is None:
            raise BundleNotFound(f"{shown(name)} is not installed", "edge-slm info lists what is")
        return one

    def _roll_back(self, one: Installed) -> Installed:
        if one.previous is None:
            raise BundleNotFound(f"{one.name} has no previous release", "install another one")
        return self._write(Installed(one.name, one.previous))

    def _add(self, source: Path, files: Mapping[str, Any], release: Release) -> None:
        """Copies and verifies; a bundle that is there already is verified again."""
        from edge_slm_runtime.bundle import MANIFEST, SIGNATURES
        from edge_slm_runtime.integrity import verify

        target = self.folder(release)
        with suppress(EdgeSlmError):
            verify(target)
            return
        if target.exists():  # it was damaged since
            shutil.rmtree(target)
        names = [MANIFEST, *files]
        names += [SIGNATURES] * (source / SIGNATURES).exists()
        with write_folder_aside(target) as folder:
            for path in names:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / path, folder / path)
            if verify(folder).digest != release.digest:
                raise BundleError(f"{source} was changed while it was copied", "install it again")

    def _state(self, name: str) -> Path:
        return self.root / "models" / f"{name}.json"

    def _write(self, one: Installed) -> Installed:
        previous = asdict(one.previous) if one.previous else None
        write_json({"current": asdict(one.current), "previous": previous}, self._state(one.name))
        return one

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One process at a time changes the store; another waits. Raises StoreNotWritable."""
        path = self.root / ".lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                lock(file, path, wait=True)
                yield
        except OSError as error:
            where, why = error.filename or self.root, error.strerror or error
            raise StoreNotWritable(
                f"the store cannot be changed: {where}: {why}",
                "free space, or set EDGE_SLM_HOME to a folder of yours",
            ) from None
