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
from edge_slm_runtime.decoder import gpt2


class BundleWriter:
    """Writes into `folder`, which only its caller makes visible."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, name: str) -> None:
        self.folder, self.name = folder, name
        config = checkpoint.config
        self._form = checkpoint.codec.form
        self.parameters = config.parameters
        self.decoder = gpt2(
            layers=config.layers,
            heads=config.heads,
            width=config.width,
            vocab_size=config.vocab_size,
            positions=config.positions,
            inner=config.inner,
            norm_epsilon=config.layer_norm_epsilon,
            activation=config.activation,
            attention_scale=config.attention_scale,
            tied=config.tied,
        )
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
            prompt=self._form,
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
