"""What a process will need is said before anything is loaded, and kept to."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_slm_runtime import Request, load, read_manifest
from edge_slm_runtime.bundle import Variant
from edge_slm_runtime.decoder import gpt2
from edge_slm_runtime.engines.base import native_error
from edge_slm_runtime.errors import BadSetting, OutOfMemory
from edge_slm_runtime.memory import memory_estimate

pytestmark = pytest.mark.slow

REFERENCE = Path(__file__).parents[2] / "models/reference"
# GPT-2 of 98M parameters: MiB measured on Linux x86-64 as in `test_measured…` below.
FACTS = gpt2(layers=12, heads=12, width=768, vocab_size=16384, positions=512)
MEASURED = {"fp32": (390_070_272, 494), "int8": (103_647_232, 233), "int4": (61_174_272, 177)}


@pytest.fixture(scope="module")
def reference_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edge_slm_converters import convert

    path = tmp_path_factory.mktemp("memory") / "reference"
    convert(REFERENCE, path, ("onnx-fp32", "onnx-int8", "numba-int8"), accept=True)
    return path


@pytest.mark.parametrize(
    ("engine", "precision"), [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("numba", "int8")]
)
@pytest.mark.parametrize("words", [2, 150])
def test_measured_in_a_fresh_process(
    reference_bundle: Path, engine: str, precision: str, words: int
) -> None:
    code = """
import sys, edge_slm_runtime
from edge_slm_runtime.memory import memory_estimate, peak_rss_mb
path, engine, precision, words = sys.argv[1:]
slm = edge_slm_runtime.load(path, engine, precision, threads=2, prefix_cache_mb=0)
out = slm.generate("word " * int(words), max_new_tokens=60, no_repeat_ngram_size=0)
tokens = out.stats.prompt_tokens + out.stats.new_tokens
print(peak_rss_mb(), memory_estimate(slm.manifest, slm.variant, positions=tokens))
"""
    arguments = (str(reference_bundle), engine, precision, str(words))
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True)
    measured, estimate = map(float, out.stdout.split())
    assert abs(estimate - measured) <= max(10, 0.1 * measured)


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A new one, whose memory can be limited."""
    top = Path("/sys/fs/cgroup")
    group = (top / "memory" if (top / "memory").is_dir() else top) / f"edge-slm-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    if not limit_of(group).exists():
        group.rmdir()
        pytest.skip("control groups do not limit memory here")
    with suppress(OSError):  # version 1 has no such file
        (group / "memory.swap.max").write_text("0")
    yield group
    group.rmdir()


def limit_of(group: Path) -> Path:
    old = group / "memory.limit_in_bytes"  # version 1
    return old if old.exists() else group / "memory.max"


@pytest.mark.parametrize(
    ("engine", "precision"), [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("numba", "int8")]
)
def test_a_control_group_of_the_estimated_size_is_enough(
    reference_bundle: Path, control_group: Path, engine: str, precision: str
) -> None:
    code = """
import os, sys
from pathlib import Path
limit, path, engine, precision = sys.argv[1:]
Path(limit).parent.joinpath("cgroup.procs").write_text(str(os.getpid()))
import edge_slm_runtime
from edge_slm_runtime.errors import OutOfMemory
from edge_slm_runtime.memory import memory_estimate
how = dict(engine=engine, precision=precision, threads=2, prefix_cache_mb=0)
manifest = edge_slm_runtime.read_manifest(Path(path))
variant = next(v for v in manifest.variants if v.engine == engine and v.precision == precision)
mib = memory_estimate(manifest, variant, 1)
Path(limit).write_text(str(int(mib * 2**20)))
try:  # refused before anything is loaded, so that the kernel does not kill the process
    edge_slm_runtime.load(path, max_memory_mb=mib / 2, **how)
except OutOfMemory:
    slm = edge_slm_runtime.load(path, max_memory_mb=mib, **how)
    print(slm.generate("word " * 150, max_new_tokens=60, no_repeat_ngram_size=0).text)
"""
    arguments = (limit_of(control_group), reference_bundle, engine, precision)
    out = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip()


@pytest.mark.parametrize("precision", MEASURED)
def test_the_formula_for_a_model_of_98m(tiny_bundle: Path, precision: str) -> None:
    weights, measured = MEASURED[precision]
    manifest = replace(read_manifest(tiny_bundle), model=FACTS)
    variant = Variant("x", "onnxruntime", precision, "x", weights, weights)
    estimate = memory_estimate(manifest, variant, positions=490)
    assert abs(estimate - measured) <= max(10, 0.1 * measured)


def test_too_little_is_refused_with_what_fits(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    ours = [v for v in manifest.variants if v.engine == "onnxruntime"]
    needs = {v.precision: memory_estimate(manifest, v) for v in ours}
    with pytest.raises(OutOfMemory) as caught:
        load(tiny_bundle, "onnxruntime", "fp32", max_memory_mb=needs["fp32"] + 1)
    assert (caught.value.code, caught.value.exit_code) == ("out_of_memory", 12)
    line = str(caught.value)
    assert "\n" not in line
    assert f"fp32 needs up to {needs['fp32'] + 16:.0f} MiB of memory, more than" in line
    assert "this fits: " in line
    assert f"onnxruntime int8 ({needs['int8']:.0f} MiB)" in line
    with pytest.raises(OutOfMemory, match=r"the least that this bundle needs is .* MiB\)"):
        load(tiny_bundle, "onnxruntime", "int8", max_memory_mb=20)
    load(
        tiny_bundle,
        "onnxruntime",
        "fp32",
        max_memory_mb=needs["fp32"] + 9,
        prefix_cache_mb=np.int32(8),
    )
    load(tiny_bundle, "ctranslate2", "int8", max_memory_mb=100, prefix_cache_mb=200)  # has none


def test_it_bounds_the_rows_of_a_batch(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    variant = next(v for v in manifest.variants if v.name == "onnx-int8")
    limit = memory_estimate(manifest, variant, rows=20)
    with load(
        tiny_bundle, "onnxruntime", "int8", max_memory_mb=limit, prefix_cache_mb=0, threads=1
    ) as slm:
        requests = [Request("a cat", max_new_tokens=3)] * 21
        assert len(list(slm.generate_batch(requests, 20))) == 21
        with pytest.raises(OutOfMemory, match=r"batch_size of 21 needs more .* \(at most 20\)"):
            slm.generate_batch(requests, 21)
    with load(tiny_bundle, "ctranslate2", "int8", max_memory_mb=200, threads=1) as slm:
        slm.generate_batch(requests, 1000)  # one at a time


def test_it_bounds_the_rows_of_all_callers(tiny_bundle: Path) -> None:
    """Streams that are left open count until they are closed or collected."""
    manifest = read_manifest(tiny_bundle)
    variant = next(v for v in manifest.variants if v.name == "onnx-int8")
    limit = memory_estimate(manifest, variant, rows=3)
    with load(
        tiny_bundle, "onnxruntime", "int8", max_memory_mb=limit, prefix_cache_mb=0, threads=1
    ) as slm:
        streams = [slm.stream("a cat", max_new_tokens=20) for _ in range(3)]
        for stream in streams:
            next(stream)
        with pytest.raises(OutOfMemory, match=r"4 answers at a time .* \(at most 3;"):
            slm.generate("a cat")
        with pytest.raises(OutOfMemory, match="5 answers at a time"):
            list(slm.generate_batch([Request("a cat")], 2))
        streams.pop().close()
        assert slm.generate("a cat", max_new_tokens=3).token_ids
        del stream, streams
        assert len(list(slm.generate_batch([Request("a cat", max_new_tokens=3)] * 4, 3))) == 4


@pytest.mark.parametrize("engine", ["onnxruntime", "numba"])
def test_rows_for_which_there_is_no_memory(tiny_bundle: Path, engine: str) -> None:
    with load(tiny_bundle, engine, "int8", threads=1) as slm:
        with pytest.raises(OutOfMemory, match=r"no memory for .* \(choose a smaller batch_size\)"):
            list(slm.generate_batch([Request("a cat")], 10**12))
        assert slm.generate("a cat", max_new_tokens=3).token_ids


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("std::bad_alloc"), "out_of_memory"),
        (RuntimeError("mkl_malloc: failed to allocate memory"), "out_of_memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (RuntimeError("Failed to allocate memory for requested buffer"), "out_of_memory"),
        (RuntimeError("no such allocator"), "engine"),
    ],
)
def test_how_libraries_say_that_there_is_no_memory(error: Exception, code: str) -> None:
    assert native_error("it failed", error).code == code


@pytest.mark.parametrize("size", [-1, float("nan"), True, "16"])
def test_the_bound_is_checked(tiny_bundle: Path, size: float) -> None:
    with pytest.raises(BadSetting, match="max_memory_mb"):
        load(tiny_bundle, max_memory_mb=size)
