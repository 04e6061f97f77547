"""Brings the kernels into the process: from the cache of this user, or compiled anew.

numba compiles them once, which takes a quarter of a minute, for the very processor that it
runs on. What is kept is machine code that calls nothing but the C library, so that later
processes need llvmlite alone, and a tenth of a second.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

_SOURCES = ("tile", "native", "strip", "product", "layers", "attention", "gpt2", "tables")
_NAME = "entry"
_DIGEST = 32  # bytes

Entry = Callable[[int, int], int]
_alive: list[Any] = []  # what holds the code in memory


@cache
def kernels() -> Entry:
    """entry(address of a table, thread) of `gpt2.make_entry`; it lets go of the GIL.

    Raises ImportError without llvmlite, or without numba when there is code to compile.
    """
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )
    file = _cache_folder() / f"{_key()}.o"
    code = _read(file)
    if code is None:
        code = _compile(llvm, target)
        with suppress(OSError):  # no place to keep it: compiled again next time
            _write(file, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _alive.append(engine)
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return kind(engine.get_function_address(_NAME))


def has_vnni() -> bool:
    """Whether this processor multiplies and adds four bytes at once in 512-bit vectors.

    Without it the kernels give the same numbers, slower than onnxruntime does.
    """
    import llvmlite.binding as llvm

    return bool(llvm.get_host_cpu_features().get("avx512vnni"))


def _compile(llvm: Any, target: Any) -> bytes:
    from numba import cfunc, types

    from edge_slm_runtime.kernels.gpt2 import make_entry

    entry = make_entry(has_vnni())

    def call(table: int, thread: int) -> int:
        return entry(table, thread)

    start = cfunc(types.int64(types.int64, types.int64))(call)

    module = llvm.parse_assembly(start.inspect_llvm())
    # Seen as one whole, no function raises, and what would tell Python of it falls away.
    for item in (*module.functions, *module.global_variables):
        if item.name == start.native_name:
            item.name = _NAME
        elif not item.is_declaration:
            item.linkage = "internal"
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(target, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(target.emit_object(module))


def _key() -> str:
    """Of the code: its sources, its compiler, its processor."""
    import llvmlite.binding as llvm

    root = Path(__file__).parent.parent
    parts = [(root / f"kernels/{name}.py").read_bytes() for name in _SOURCES]
    parts.append((root / "panels.py").read_bytes())
    for text in (
        version("numba"),
        version("llvmlite"),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
    ):
        parts.append(text.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "edge-slm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-slm"


def _read(file: Path) -> bytes | None:
    """The code that was kept; None when there is none, or not all of it."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    code = content[_DIGEST:]
    return code if hashlib.sha256(code).digest() == content[:_DIGEST] else None


def _write(file: Path, code: bytes) -> None:
    """For this user alone: it is going to be run."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(hashlib.sha256(code).digest() + code)
            out.flush()
            os.fsync(out.fileno())
        Path(aside).replace(file)
    except BaseException:
        Path(aside).unlink()
        raise
