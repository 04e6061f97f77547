"""The variants of a bundle: the meaning of their names, and how one is written and opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.ct2 import write_ctranslate2
from edge_slm_converters.graph import write_graph
from edge_slm_converters.panels import write_panels
from edge_slm_converters.quantise import Precision
from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.cores import default_threads
from edge_slm_runtime.engines.base import EngineOptions
from edge_slm_runtime.engines.choice import open_engine
from edge_slm_runtime.generate import SLM
from edge_slm_runtime.memory import PREFIX_CACHE_MB


@dataclass(frozen=True, slots=True)
class Target:
    """Engine and precision of a variant."""

    engine: str
    precision: str


VARIANTS: Mapping[str, Target] = {
    "onnx-fp32": Target("onnxruntime", "fp32"),
    "onnx-int8": Target("onnxruntime", "int8"),
    "onnx-int4": Target("onnxruntime", "int4"),
    "numba-int8": Target("numba", "int8"),
    "numba-int4": Target("numba", "int4"),
    "ctranslate2-int8": Target("ctranslate2", "int8"),
    "ctranslate2-float32": Target("ctranslate2", "fp32"),
}
DEFAULT_VARIANTS = tuple(name for name in VARIANTS if name != "ctranslate2-float32")
REFERENCE = "onnx-fp32"  # all others are measured against it

# Each writes into a folder and returns the bytes of weights that one decoding step reads.
WRITERS: Mapping[str, Callable[[Checkpoint, Precision, Path], int]] = {
    "onnxruntime": write_graph,
    "numba": write_panels,
    "ctranslate2": lambda source, precision, folder: write_ctranslate2(
        source, precision.name, folder
    ),
}


@dataclass(frozen=True, slots=True)
class Model:
    """Weights, and how their matrices are stored."""

    source: Checkpoint
    precision: Precision


def write_variant(name: str, model: Model, folder: Path) -> Variant:
    """Writes the variant `name` into `folder/name`. Raises what its writer raises."""
    target, place = VARIANTS[name], folder / name
    place.mkdir()
    per_token = WRITERS[target.engine](model.source, model.precision, place)
    size = sum(file.stat().st_size for file in place.iterdir())
    return Variant(name, target.engine, target.precision, name, size, per_token)


def open_variant(folder: Path, source: Checkpoint, variant: Variant) -> SLM:
    """Opens a variant below `folder`, which is no bundle yet: the bare model, without a lexicon.
    Raises what `load` raises."""
    manifest = Manifest(
        name=folder.name,
        model=source.decoder,
        parameters=source.parameters,
        prompt=source.form,
        variants=(variant,),
        files={},
    )
    options = EngineOptions(
        variant.precision, default_threads(), cache_bytes=int(PREFIX_CACHE_MB * (1 << 20))
    )
    engine = open_engine(folder / variant.path, manifest, variant, options)
    return SLM(manifest, variant, source.codec, engine, [], 0.0)
