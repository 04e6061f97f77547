"""What only a fresh process shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = ("onnxruntime", "ctranslate2", "numba")


def python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("engine", ENGINES)
def test_no_training_stack_and_no_telemetry(tiny_bundle: Path, engine: str) -> None:
    out = python(
        """
import os, sys
import edge_slm_runtime
engines = {"onnxruntime", "ctranslate2", "llvmlite"}
assert not engines & set(sys.modules), "they are imported when used"
with edge_slm_runtime.load(sys.argv[1], sys.argv[2], threads=1) as slm:
    slm.generate("a cat", words=3, max_new_tokens=20)
heavy = {"torch", "transformers", "optimum", "onnx", "psutil", "safetensors", "numba"}
told = os.environ["ORT_DISABLE_TELEMETRY"], os.environ["ORT_TELEMETRY_DISABLED"]
print(heavy & set(sys.modules), *told)
""",
        str(tiny_bundle),
        engine,
    )
    assert out.split() == ["set()", "1", "1"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_child_is_refused_and_does_not_hang(tiny_bundle: Path, engine: str) -> None:
    out = python(
        """
import os, sys, warnings
import edge_slm_runtime
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork with threads
slm = edge_slm_runtime.load(sys.argv[1], sys.argv[2], threads=2)
stream = slm.stream("a cat", max_new_tokens=30)
next(stream)
child = os.fork()
if not child:
    for call in (lambda: slm.generate("a cat"), lambda: next(stream)):
        try:
            call()
        except edge_slm_runtime.EdgeSlmError as error:
            print(error.code)
    slm.close()
    del slm, stream
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
list(stream)
print(stream.result.finish_reason)
""",
        str(tiny_bundle),
        engine,
    )
    assert out.split() == ["used_after_fork", "used_after_fork", "max_tokens"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("end", ["", "slm.close()"])  # more ends: test_lifetime
def test_a_process_ends_well_without_close(tiny_bundle: Path, engine: str, end: str) -> None:
    python(
        f"""
import sys, edge_slm_runtime
slm = edge_slm_runtime.load(sys.argv[1], sys.argv[2], threads=1)
slm.generate("a cat", max_new_tokens=5)
{end}
""",
        str(tiny_bundle),
        engine,
    )


def test_import_is_light() -> None:
    out = python(
        """
import time
start = time.process_time()
import edge_slm_runtime
print(time.process_time() - start)
"""
    )
    assert float(out) < 0.5, "about 0.13 s when the machine is idle"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_nothing_is_compiled_where_the_address_space_is_too_small(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    out = python(
        """
import resource, sys
from edge_slm_runtime import EdgeSlmError, load
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (270 << 20), -1))
try:
    load(sys.argv[1], "numba", "int8", threads=1)
except EdgeSlmError as error:
    print(error.code, "512 MiB of address space" in str(error))
""",
        str(tiny_bundle),
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert out.split() == ["engine_not_installed", "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_address_space_that_is_too_small(tiny_bundle: Path, engine: str) -> None:
    """Refused as such, or enough: no other error, no signal, no hang, and nothing on stdout."""
    out = python(
        """
import resource, sys
import edge_slm_runtime, numpy.random
from edge_slm_runtime import EdgeSlmError, load
with load(sys.argv[1], "onnxruntime", "int8", threads=1):  # imports what a process needs
    pass
__import__(sys.argv[2])
if sys.argv[2] == "numba":
    load(sys.argv[1], "numba", "int8", threads=1).close()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
codes = []
for room in (0, 1, 3, 8, 20, 64, 1000):
    resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20), -1))
    try:
        with load(sys.argv[1], sys.argv[2], "int8", threads=2) as slm:
            slm.generate("a cosy cabin", max_new_tokens=5)
        codes.append("answered")
    except EdgeSlmError as error:
        codes.append(error.code)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(codes[-1], *sorted(set(codes)))
""",
        str(tiny_bundle),
        engine,
    )
    assert out.split() == ["answered", "answered", "out_of_memory"]
