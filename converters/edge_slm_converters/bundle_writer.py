"""Puts a bundle together in a folder: files, then a manifest that lists them.

`edge_slm_runtime.bundle` owns the format; this only fills it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_runtime.bundle import (
    MANIFEST,
    TOKENIZER,
    Golden,
    Manifest,
    Variant,
    file_entry,
)


class BundleWriter:
    """Writes into `folder`, which only its caller makes visible."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, name: str) -> None:
        self.folder, self.name = folder, name
        self._schema = checkpoint.schema
        self.decoder, self.parameters = checkpoint.decoder, checkpoint.parameters
        shutil.copyfile(checkpoint.path / TOKENIZER, folder / TOKENIZER)

    def write_manifest(
        self,
        variants: Sequence[Variant],
        goldens: Sequence[Golden] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Lists every file that is there now and writes manifest.json."""
        manifest = Manifest(
            name=self.name,
            model=self.decoder,
            parameters=self.parameters,
            command=self._schema,
            variants=tuple(variants),
            files={
                path.relative_to(self.folder).as_posix(): file_entry(path)
                for path in sorted(self.folder.rglob("*"))
                if path.is_file() and path.name != MANIFEST
            },
            goldens=tuple(goldens),
            provenance=provenance or {},
        )
        text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        (self.folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        return manifest
