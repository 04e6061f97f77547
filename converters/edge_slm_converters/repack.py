"""A bundle's weights for the numba engine: the levels of its ONNX variants, as they are.

Nothing is quantised again, so that it needs neither the checkpoint nor calibration, takes
seconds, and gives the bytes that converting the checkpoint gave.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from edge_slm_converters.bundle_writer import save_manifest
from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.dequantise import stored
from edge_slm_converters.quantise import Quantised
from edge_slm_converters.text_side import TextSide
from edge_slm_converters.variants import Model, open_variant, write_variant
from edge_slm_runtime import verify
from edge_slm_runtime.bundle import TOKENIZER, Manifest, file_entry
from edge_slm_runtime.errors import CheckpointError
from edge_slm_runtime.files import write_folder_aside
from edge_slm_runtime.memory import memory_estimate
from edge_slm_runtime.text import TextCodec


def repack(bundle: Path, out: Path) -> Manifest:
    """Writes the folder `out`: the bundle, and beside each ONNX variant of 8 or 4 bits the numba
    variant with the same levels, where it lacks one.

    The new variants have goldens, and no figures of fidelity: those are measured against weights
    that the bundle does not have. Raises what `verify` raises, CheckpointError where there is
    nothing to do, TargetExists, EngineNotInstalled, DependencyMissing.
    """
    manifest = verify(bundle)
    there = {(v.engine, v.precision) for v in manifest.variants}
    sources = [
        v
        for v in manifest.variants
        if v.engine == "onnxruntime"
        and v.precision in ("int8", "int4")
        and ("numba", v.precision) not in there
    ]
    if not sources:
        raise CheckpointError(
            f"{bundle} has no ONNX variant of 8 or 4 bits without its numba variant"
        )
    with write_folder_aside(out) as folder:
        for path in manifest.files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / path, folder / path)
        tokenizer = (folder / TOKENIZER).read_bytes()
        text = TextSide(TextCodec(tokenizer, manifest.prompt), tokenizer, ())
        variants, goldens = [*manifest.variants], [*manifest.goldens]
        for variant in sources:
            content = stored(bundle, manifest, variant)
            source = Checkpoint(
                bundle, manifest.model, content.tensors, manifest.parameters, text, ()
            )
            model = Model(source, Quantised(variant.precision, content.blocks))
            new = write_variant(f"numba-{variant.precision}", model, folder)
            with open_variant(folder, source, new) as slm:
                memory = memory_estimate(slm.manifest, new)
                ids = [slm.greedy_ids(g.request, g.command, g.max_new_tokens) for g in goldens]
            variants.append(replace(new, peak_rss_mb=round(memory, 1)))
            goldens = [
                replace(golden, ids={**golden.ids, new.name: own})
                for golden, own in zip(goldens, ids, strict=True)
            ]
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        repacked = replace(
            manifest,
            variants=tuple(variants),
            goldens=tuple(goldens),
            files={path.relative_to(folder).as_posix(): file_entry(path) for path in files},
            provenance={**manifest.provenance, "repacked_from": manifest.digest},
        )
        save_manifest(repacked, folder)
    return repacked
