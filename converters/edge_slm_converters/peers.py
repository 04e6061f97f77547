"""Other engines on the same weights, made ready for the benchmark.

Every artefact comes from one checkpoint, at that engine's own settings for speed. Each is
made in a process of its own (`python -m edge_slm_converters.peers`, a JSON job on stdin,
the result on the last line of stdout): exporters print, hold gigabytes and may die.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from edge_slm_bench.machine import machine
from edge_slm_bench.runners import Spec
from edge_slm_bench.runners.optimum import FILES
from edge_slm_converters.architectures.base import plain_attention
from edge_slm_converters.checkpoint import Checkpoint, read_checkpoint, weight_files
from edge_slm_converters.ct2 import write_ctranslate2
from edge_slm_converters.gguf_writer import Quantisation, write_gguf
from edge_slm_converters.hugging_face import write_weights
from edge_slm_converters.openvino_ir import write_openvino
from edge_slm_converters.quantise import step_bytes
from edge_slm_runtime.bundle import TOKENIZER
from edge_slm_runtime.engines.base import first_line
from edge_slm_runtime.errors import CheckpointError, EdgeSlmError
from edge_slm_runtime.files import write_folder_aside


@dataclass(frozen=True, slots=True)
class Peer:
    """runner: the module under `edge_slm_bench.runners`. packages: what it needs, by the
    names of their distributions."""

    runner: str
    engine: str
    precision: str
    packages: tuple[str, ...]


_TORCH, _GGUF = ("torch", "transformers"), ("gguf", "llama-cpp-python")
# Names differ from those of a bundle's variants: CTranslate2 is both.
PEERS: Mapping[str, Peer] = {
    "transformers-fp32": Peer("transformers", "transformers", "fp32", _TORCH),
    "torch-int8": Peer("transformers", "torch", "int8", _TORCH),
    "optimum-fp32": Peer("optimum", "optimum", "fp32", ("optimum-onnx",)),
    "optimum-int8": Peer("optimum", "optimum", "int8", ("optimum-onnx",)),
    "ct2-fp32": Peer("ctranslate2", "ctranslate2", "fp32", ("ctranslate2",)),
    "ct2-int8": Peer("ctranslate2", "ctranslate2", "int8", ("ctranslate2",)),
    "openvino-fp32": Peer("openvino", "openvino", "fp32", ("openvino",)),
    "openvino-int8": Peer("openvino", "openvino", "int8", ("openvino", "nncf")),
    "llama.cpp-F16": Peer("llama_cpp", "llama.cpp", "f16", _GGUF),
    "llama.cpp-Q8_0": Peer("llama_cpp", "llama.cpp", "int8", _GGUF),
    "llama.cpp-Q4_0": Peer("llama_cpp", "llama.cpp", "int4", _GGUF),
}


def prepare(
    checkpoint: Path,
    folder: Path,
    names: Sequence[str],
    progress: Callable[[str], None] | None = None,
    context: int | None = None,
) -> tuple[list[Spec], dict[str, str]]:
    """Makes the peers `names` (of `PEERS`) ready, their files under `folder`.

    progress: called with each name before it is begun. context: positions that they get, by
    default all of the checkpoint's; some engines take memory for each. Returns the specs of what is
    ready, and name → reason for what is not: a package that is not installed, or the
    first line of its exporter's error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs, missing = [], {}
    for name in names:
        if progress:
            progress(name)
        absent = [package for package in PEERS[name].packages if not _installed(package)]
        if absent:
            missing[name] = f"{' and '.join(absent)} not installed (pip install 'edge-slm[peers]')"
            continue
        made = _in_own_process(name, checkpoint, folder, context)
        if isinstance(made, str):
            missing[name] = made
        else:
            specs.append(made)
    return specs, missing


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _in_own_process(name: str, checkpoint: Path, folder: Path, context: int | None) -> Spec | str:
    """The spec, or why there is none."""
    paths = {"checkpoint": str(checkpoint), "folder": str(folder)}
    job = {"name": name, **paths, "context": context}
    child = subprocess.run(
        [sys.executable, "-m", "edge_slm_converters.peers"],
        input=json.dumps(job),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        said = [line for line in child.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return f"its export ended with status {child.returncode}: {said[-1].strip()}"
    answer = json.loads(lines[-1])
    return str(answer["error"]) if "error" in answer else Spec.of(answer)


def make(name: str, checkpoint: Path, folder: Path, context: int | None = None) -> Spec:
    """Makes one peer ready in this process; raises what its exporter raises."""
    peer = PEERS[name]
    source, target = read_checkpoint(checkpoint, context=context), folder / name
    per_token = 0
    match peer.runner:
        case "transformers":  # reads the checkpoint itself
            target = _as_folder(source, folder)
            files = weight_files(target)
        case "llama_cpp":
            target = folder / f"{name}.gguf"
            quantisation = cast(Quantisation, name.removeprefix("llama.cpp-"))
            per_token, files = write_gguf(source, target, quantisation), [target]
        case "optimum":
            _write_optimum(source, peer.precision, folder)
            files = list(target.glob("*.onnx*"))
        case _:
            write = write_openvino if peer.runner == "openvino" else write_ctranslate2
            with write_folder_aside(target) as place:
                per_token = write(source, peer.precision, place)
            files = list(target.iterdir())
    return Spec(
        runner=peer.runner,
        variant=name,
        engine=peer.engine,
        precision=peer.precision,
        path=str(target),
        disk_bytes=sum(file.stat().st_size for file in files),
        step_bytes=per_token or step_bytes(source.decoder, peer.precision),
        peer=True,
    )


def _as_folder(source: Checkpoint, folder: Path) -> Path:
    """The checkpoint as a Hugging Face folder: its own, or one written for a GGUF file."""
    if source.path.is_dir():
        return source.path
    written = folder / "checkpoint"
    if not written.exists():
        with write_folder_aside(written) as place:
            write_weights(place, source.decoder, source.tensors)
            (place / TOKENIZER).write_bytes(source.text.tokenizer)
    return written


def _write_optimum(source: Checkpoint, precision: str, folder: Path) -> None:
    """optimum's ONNX export with a KV cache, and its dynamic int8 preset for this processor.

    Raises CheckpointError for an attention scale that the export leaves out.
    """
    if not plain_attention(source.decoder):
        raise CheckpointError("optimum's export scales attention by head width alone")
    exported = folder / "optimum-fp32"
    if not exported.exists():
        from optimum.exporters.onnx import main_export

        with write_folder_aside(exported) as place:
            main_export(
                str(_as_folder(source, folder)),
                place,
                task="text-generation-with-past",
                dtype="fp32",
                device="cpu",
                do_validation=False,
                library_name="transformers",
            )
    if precision == "int8":
        from optimum.onnxruntime import ORTQuantizer

        quantizer = ORTQuantizer.from_pretrained(exported, file_name=FILES["fp32"])
        with write_folder_aside(folder / "optimum-int8") as place:
            quantizer.quantize(save_dir=place, quantization_config=_int8_preset())


def _int8_preset() -> Any:
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    if platform.machine().lower() in ("aarch64", "arm64"):
        preset = AutoQuantizationConfig.arm64
    elif "avx512_vnni" in machine().isa:
        preset = AutoQuantizationConfig.avx512_vnni
    else:
        preset = AutoQuantizationConfig.avx2
    return preset(is_static=False, per_channel=True)


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the checkpoint
    warnings.simplefilter("ignore")
    job = json.load(sys.stdin)
    try:
        paths = Path(job["checkpoint"]), Path(job["folder"])
        made = make(job["name"], *paths, job["context"]).as_dict()
    except EdgeSlmError as error:
        made = {"error": str(error)}
    except Exception as error:
        made = {"error": f"its export failed: {type(error).__name__}: {first_line(error)}"}
    print(f"\n{json.dumps(made)}")


if __name__ == "__main__":
    main()
