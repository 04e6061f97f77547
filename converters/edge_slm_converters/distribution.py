"""A bundle as a Python distribution: installed by pip, loaded by its name.

    OUT/pyproject.toml, README.md (the model card), licence files
    OUT/edge_slm_model_NAME/__init__.py     BUNDLE, the path of the bundle folder
    OUT/edge_slm_model_NAME/NAME/           the bundle

`edge_slm_runtime.installed` finds it by its entry point.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from edge_slm_converters.bundle_writer import save_manifest
from edge_slm_converters.model_card import model_card
from edge_slm_runtime.bundle import Manifest
from edge_slm_runtime.errors import BadSetting, VariantNotFound, shown
from edge_slm_runtime.files import write_folder_aside
from edge_slm_runtime.installed import GROUP, find_bundle
from edge_slm_runtime.integrity import verify

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*((a|b|rc|\.post|\.dev)[0-9]+)?")
_LICENSE = re.compile(r"[A-Za-z0-9.+() -]+")  # characters of SPDX expressions

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "edge-slm-model-{name}"
version = "{version}"
description = "The language model {name} as a bundle of edge-slm."
readme = "README.md"
license = "{license}"
license-files = [{license_files}]

[project.entry-points."{group}"]
{name} = "{package}:BUNDLE"

[tool.setuptools]
packages = ["{package}"]
include-package-data = false

[tool.setuptools.package-data]
{package} = ["{name}/**/*"]
"""

_INIT = '''\
"""The language model {name} as a bundle of edge-slm."""

from pathlib import Path

BUNDLE = Path(__file__).parent / "{name}"
'''


def write_distribution(
    bundle: str | Path,
    out: str | Path,
    *,
    license: str,  # noqa: A002
    license_files: Sequence[Path] = (),
    name: str | None = None,
    version: str = "0.1.0",
    variants: Sequence[str] | None = None,
    card: str = "",
) -> Manifest:
    """Writes the distribution folder `out` with the verified `bundle`; returns its manifest.

    license: SPDX expression. license_files: copied into the folder under their names, such as
    LICENSE and NOTICE. name: of the model, by default the bundle's. variants: names of those to
    keep, by default all. card: Markdown for the model card, of what a manifest does not
    say (base model, data and their licences, evaluation, known failures).

    Raises what `verify` raises, BadSetting, VariantNotFound, TargetExists; then `out` does not
    exist.
    """
    source = find_bundle(bundle)
    whole = verify(source)
    name = whole.name if name is None else name
    _check(name, version, license, license_files)
    manifest = reduced(whole, name, variants)
    package = f"edge_slm_model_{name.replace('-', '_')}"
    with write_folder_aside(Path(out)) as folder:
        _copy(source, manifest, folder / package / name)
        for file in license_files:
            shutil.copyfile(file, folder / file.name)
        files = {
            f"{package}/__init__.py": _INIT.format(name=name),
            "README.md": model_card(manifest, license, card),
            "pyproject.toml": _PYPROJECT.format(
                name=name,
                package=package,
                version=version,
                license=license,
                license_files=", ".join(f'"{file.name}"' for file in license_files),
                group=GROUP,
            ),
        }
        for path, text in files.items():
            (folder / path).write_text(text, encoding="utf-8")
    return manifest


def write_reduced(bundle: Path, out: Path, variants: Sequence[str]) -> Path:
    """Writes the verified bundle with these variants alone as the folder `out`, and returns that.
    Raises as `write_distribution`."""
    whole = verify(bundle)
    with write_folder_aside(out) as folder:
        _copy(bundle, reduced(whole, whole.name, variants), folder)
    return out


def _copy(source: Path, manifest: Manifest, home: Path) -> None:
    """The files that the manifest lists, and itself."""
    for path in manifest.files:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, home / path)
    save_manifest(manifest, home)
    verify(home)


def _check(name: str, version: str, spdx: str, license_files: Sequence[Path]) -> None:
    """Raises BadSetting for what pip or the entry point could not take."""
    if not _NAME.fullmatch(name):
        raise BadSetting(
            f"{shown(name)} is no name for an installed model",
            "give a name of lower-case letters, digits and single hyphens",
        )
    if not _VERSION.fullmatch(version):
        raise BadSetting(f"version is {shown(version)}", "give one such as 0.1.0")
    if not _LICENSE.fullmatch(spdx):
        raise BadSetting(f"license is {shown(spdx)}", "give an SPDX expression such as Apache-2.0")
    names = [file.name for file in license_files]
    plain = all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in names)
    taken = {"pyproject.toml", "README.md"} & set(names)
    if not plain or taken or len(set(names)) < len(names):
        raise BadSetting(
            f"licence files are named {', '.join(names)}",
            "give each a plain name of its own, such as LICENSE and NOTICE",
        )


def reduced(manifest: Manifest, name: str, variants: Sequence[str] | None) -> Manifest:
    """The manifest under that name, with the chosen variants alone. Raises VariantNotFound."""
    there = {variant.name: variant for variant in manifest.variants}
    chosen = tuple(there) if variants is None else tuple(dict.fromkeys(variants))
    if unknown := [variant for variant in chosen if variant not in there]:
        raise VariantNotFound(
            f"{manifest.name} has no variant {shown(unknown[0])}", f"it has {', '.join(there)}"
        )
    kept = [there[variant] for variant in chosen]
    files = {path for variant in kept for path in manifest.files_of(variant)}
    goldens = tuple(
        replace(golden, ids={v: ids for v, ids in golden.ids.items() if v in chosen})
        for golden in manifest.goldens
    )
    return replace(
        manifest,
        name=name,
        variants=tuple(kept),
        files={path: entry for path, entry in manifest.files.items() if path in files},
        goldens=goldens,
        provenance=_portable(manifest.provenance),
    )


def _portable(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Without the folders of the machine that trained: of the checkpoint that training began
    with, its name is left."""
    match provenance:
        case {"recipe": {"recipe": {"model": {"init": str(init)} as model, **recipe}, **made}}:
            model = {**model, "init": PurePath(init).name}
            return {**provenance, "recipe": {**made, "recipe": {**recipe, "model": model}}}
    return dict(provenance)
