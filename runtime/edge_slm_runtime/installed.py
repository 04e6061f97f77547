"""Installed models, found by their names: those of the user's store, and those of packages.

A package has an entry point of the group `edge_slm.models`: its name is that of the model,
its value the `pathlib.Path` of the bundle folder. docs/bundle.md describes both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edge_slm_runtime.errors import BundleNotFound, shown
from edge_slm_runtime.store import Store

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "edge_slm.models"


def find_bundle(bundle: str | os.PathLike[str]) -> Path:
    """The folder of a bundle that is given by its path or by the name of an installed model.

    Whatever exists is taken as a path; so is a text with a path separator, and a `Path`. Only
    any other text is looked up, in the store before the packages. Raises BundleNotFound.
    """
    if _is_path(bundle):
        return Path(bundle)
    name = str(bundle)
    if (one := (store := Store()).get(name)) is not None:
        return store.folder(one.current)
    entries = _entries()
    if name not in entries:
        names = ", ".join(sorted({*store.installed(), *entries}))
        raise BundleNotFound(
            f"there is no folder {shown(name)}, and no model of that name is installed",
            f"installed: {names}" if names else "no model is; give the folder with manifest.json",
        )
    return _folder(entries[name])


@contextmanager
def loading(bundle: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder that `find_bundle` finds, while it is loaded: see `Store.attempt`."""
    if _is_path(bundle) or (store := Store()).get(str(bundle)) is None:
        yield find_bundle(bundle)
        return
    with store.attempt(str(bundle)) as folder:
        yield folder


def installed_models() -> dict[str, Path]:
    """The bundle folder of each installed model, by name, sorted. Packages that cannot be
    imported are left out; loading such a model by its name says why."""
    found = {}
    for name, entry in _entries().items():
        with suppress(BundleNotFound):
            found[name] = _folder(entry)
    store = Store()
    found |= {name: store.folder(one.current) for name, one in store.installed().items()}
    return dict(sorted(found.items()))


def _is_path(bundle: str | os.PathLike[str]) -> bool:
    path = Path(bundle)
    return not isinstance(bundle, str) or path.name != bundle or os.path.lexists(path)


def _entries() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # takes long to import, and few need it

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _folder(entry: EntryPoint) -> Path:
    """The value of the entry point. Raises BundleNotFound when it is not to be had."""
    try:
        return Path(entry.load())
    except Exception as error:  # importing the package may raise anything
        raise BundleNotFound(
            f"the installed model {entry.name!r} cannot be found: {shown(error)}",
            "install its package again",
        ) from error
