"""Models that are installed as packages, and found by their names.

Such a package has an entry point of the group `edge_slm.models`: its name is that of the model,
its value the `pathlib.Path` of the bundle folder. docs/bundle.md describes the package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge_slm_runtime.errors import BundleNotFound, shown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "edge_slm.models"


def find_bundle(bundle: str | os.PathLike[str]) -> Path:
    """The folder of a bundle that is given by its path or by the name of an installed model.

    Whatever exists is taken as a path; so is a text with a path separator, and a `Path`. Only
    any other text is looked up among the installed models. Raises BundleNotFound.
    """
    path = Path(bundle)
    if not isinstance(bundle, str) or path.name != bundle or os.path.lexists(path):
        return path
    entries = _entries()
    if bundle not in entries:
        names = ", ".join(sorted(entries))
        raise BundleNotFound(
            f"there is no folder {shown(bundle)}, and no model of that name is installed",
            f"installed: {names}" if names else "no model is; give the folder with manifest.json",
        )
    return _folder(entries[bundle])


def installed_models() -> dict[str, Path]:
    """The bundle folder of each installed model, by name, sorted. Packages that cannot be
    imported are left out; loading such a model by its name says why."""
    found = {}
    for name, entry in sorted(_entries().items()):
        try:
            found[name] = _folder(entry)
        except BundleNotFound:
            continue
    return found


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
