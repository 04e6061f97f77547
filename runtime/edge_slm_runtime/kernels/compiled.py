"""Brings the kernels into the process: from the cache of this user, or compiled anew.

numba compiles them once, which takes a quarter of a minute, for the very processor that it
runs on. The cache holds machine code that calls nothing: where it can be made a flat image
(`elf`, x86-64 Linux), a process that only runs it needs neither numba nor llvmlite.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.files import write_aside
from edge_slm_runtime.kernels.elf import flat_image

_NAME = "entry"
_DIGEST = 32  # bytes

Entry = Callable[[int, int], int]
_alive: list[Any] = []  # owners of the code in memory


@cache
def kernels(traits: Traits) -> Entry:
    """entry(address of a table, thread) of `schedule.make_entry`, for models with these traits;
    it releases the GIL.

    Raises ImportError without numba when there is no code yet.
    """
    with suppress(OSError, ValueError):  # none yet, altered, or where no code may run
        return _mapped(_cache_file(traits, ".image"))
    try:
        code = _read(_cache_file(traits, ".o"))
    except (OSError, ValueError):
        code = _compile(traits)
        with suppress(OSError, ValueError):  # no place to keep it, another system
            image = _cache_file(traits, ".image")
            _write(image, flat_image(code, _NAME))
            return _mapped(image)
        with suppress(OSError):  # compiled again next time
            _write(_cache_file(traits, ".o"), code)
    return _linked(code)


@cache
def has_vnni() -> bool:
    """Whether this processor multiplies and adds four bytes at once in 512-bit vectors.

    Without it the kernels multiply in smaller steps, slower than onnxruntime does.
    """
    return "avx512_vnni" in _processor().split()


def _mapped(file: Path) -> Entry:
    """Raises OSError, ValueError."""
    size = len(_read(file))
    with file.open("rb") as code:
        pages = mmap.mmap(code.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_EXEC)
    _alive.append(pages)
    return _function(np.frombuffer(pages, np.uint8).ctypes.data)


def _linked(code: bytes) -> Entry:
    """An object file, by llvmlite's loader."""
    llvm, target = _target()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _alive.append(engine)
    return _function(engine.get_function_address(_NAME))


def _function(address: int) -> Entry:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return kind(address)


def _compile(traits: Traits) -> bytes:
    from logging import getLogger

    from numba import cfunc, types

    getLogger("edge_slm").warning(
        "compiling the kernels for this processor, once: about 20 seconds"
    )
    from edge_slm_runtime.kernels.forward import make_forward
    from edge_slm_runtime.kernels.schedule import make_entry

    entry = make_entry(make_forward(has_vnni(), traits))

    def call(table: int, thread: int) -> int:
        return entry(table, thread)

    start = cfunc(types.int64(types.int64, types.int64))(call)
    llvm, target = _target()
    module = llvm.parse_assembly(start.inspect_llvm())
    # Internal linkage lets LLVM see that no function raises, and drop the error paths.
    for item in (*module.functions, *module.global_variables):
        if item.name == start.native_name:
            item.name = _NAME
        elif not item.is_declaration:
            item.linkage = "internal"
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(target, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(target.emit_object(module))


def _target() -> Any:
    """llvmlite, and this processor."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm, llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="small",
    )


def _key(traits: Traits) -> str:
    """Of the code: its sources, its traits and its processor."""
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), here.parent / "panels.py", here.parent / "decoder.py"]
    parts = [source.read_bytes() for source in sources] + [
        "/".join(traits).encode(),
        _processor().encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


@cache
def _processor() -> str:
    """Its name and its features."""
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").partition("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    facts = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in first.splitlines() if line.startswith(facts))


def _cache_file(traits: Traits, suffix: str) -> Path:
    """Raises OSError for a user without a home."""
    windows = sys.platform == "win32"
    if not (folder := os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME")):
        try:
            folder = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise FileNotFoundError(str(error)) from None
    return Path(folder) / "edge-slm" / (_key(traits) + suffix)


def _read(file: Path) -> bytes:
    """Cached code. Raises OSError, ValueError when it is damaged."""
    if hasattr(os, "getuid") and file.stat().st_uid != os.getuid():
        raise ValueError(f"{file} is another user's")
    content = file.read_bytes()
    code = content[:-_DIGEST]
    if not code or hashlib.sha256(code).digest() != content[-_DIGEST:]:
        raise ValueError(f"{file} was altered")
    return code


def _write(file: Path, code: bytes) -> None:
    """For this user alone: it is going to be run."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with write_aside(file, mode=0o600) as aside:
        aside.write_bytes(code + hashlib.sha256(code).digest())
