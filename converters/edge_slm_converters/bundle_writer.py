"""Completes a bundle's folder: the tokenizer, the lexicon, and a manifest that lists every file.

`edge_slm_runtime.bundle` owns the format; this only fills it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_runtime.bundle import (
    MANIFEST,
    SIGNATURES,
    TOKENIZER,
    WORDS,
    Golden,
    Manifest,
    Variant,
    file_entry,
)
from edge_slm_runtime.deltas import FOLDER, Delta
from edge_slm_runtime.files import write_text


def write_manifest(
    folder: Path,
    name: str,
    source: Checkpoint,
    variants: Sequence[Variant],
    goldens: Sequence[Golden],
    provenance: Mapping[str, Any],
    deltas: Sequence[Delta] = (),
) -> Manifest:
    """Adds the text side and adapters to the `variants` that are in `folder`, and writes
    manifest.json."""
    (folder / TOKENIZER).write_bytes(source.text.tokenizer)
    if source.text.lexicon:
        (folder / WORDS).write_bytes(source.text.lexicon)
    for delta in deltas:
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / delta.path).write_bytes(delta.to_bytes())
    manifest = Manifest(
        name=name,
        model=source.decoder,
        parameters=source.parameters,
        prompt=source.form,
        variants=tuple(variants),
        files={
            path.relative_to(folder).as_posix(): file_entry(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        goldens=tuple(goldens),
        provenance=provenance,
    )
    save_manifest(manifest, folder)
    return manifest


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes manifest.json."""
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(text + "\n", folder / MANIFEST)


def set_version(folder: Path, manifest: Manifest, version: int) -> Manifest:
    """Numbers a release, in the place of its manifest; returns the new one, which no signature
    of the old one fits."""
    numbered = replace(manifest, version=version)
    (folder / SIGNATURES).unlink(missing_ok=True)
    save_manifest(numbered, folder)
    return numbered
