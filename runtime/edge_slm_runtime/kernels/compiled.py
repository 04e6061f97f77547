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
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import RLock
from time import monotonic, sleep
from typing import Any

import numpy as np

from edge_slm_runtime.address_space import room_mb
from edge_slm_runtime.cores import processor
from edge_slm_runtime.decoder import Traits
from edge_slm_runtime.errors import EngineNotInstalled
from edge_slm_runtime.files import cache_folder, write_aside
from edge_slm_runtime.kernels.elf import flat_image

_NAME = "entry"
_ARCHITECTURES = ("x86_64", "AMD64")  # x86-64, as Linux and Windows name it
_DIGEST = 32  # bytes
_LONGEST_WAIT = 300.0  # seconds
_COMPILING = 512  # MiB of address space; 390 were measured, numba's import among them
# Settings of numba (`numba.config`) that change the code it makes, and their usual values.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    **{"DISABLE_JIT": (0,), "BOUNDSCHECK": (None, 0), "OPT": (3,)},
    **{"LOOP_VECTORIZE": (1,), "SLP_VECTORIZE": (0,), "LLVM_REFPRUNE_PASS": (1,)},
}

Entry = Callable[[int, int], int]
_first_use = [RLock()]  # functools.cache lets simultaneous first calls all compile
if hasattr(os, "register_at_fork"):  # the thread that holds it is not in the child
    os.register_at_fork(after_in_child=lambda: _first_use.__setitem__(0, RLock()))


def kernels(traits: Traits) -> Entry:
    """entry(address of a table, thread) of `schedule.make_entry`, for models with these traits;
    it releases the GIL. Of callers that need code that is not there yet, in any thread or
    process, one compiles it and the others wait.

    Raises ImportError when there is no code yet and numba cannot make it, or when this
    processor cannot run it; EngineNotInstalled when numba is set to make other code.
    """
    with _first_use[0]:
        return _kernels(traits)


@cache
def _kernels(traits: Traits) -> Entry:
    if (architecture := processor().partition("\n")[0].split(" ")[0]) not in _ARCHITECTURES:
        raise EngineNotInstalled(
            f"numba's kernels are for x86-64 and were never tried on {architecture}",
            "engine='onnxruntime', or 'auto'",
        )
    if not has_halves():
        raise ImportError("this processor has no instructions for half precision (F16C)")
    with suppress(OSError, ValueError):  # none yet, altered, or where no code may run
        return _kept(traits)
    with _alone_in_folder():
        with suppress(OSError, ValueError):  # another process has compiled meanwhile
            return _kept(traits)
        code = _compile(traits)
        with suppress(OSError, ValueError):  # no place to keep it, another system
            image = _cache_file(traits, ".image")
            _write(image, flat_image(code, _NAME))
            return _mapped(image)
        with suppress(OSError):  # compiled again next time
            _write(_cache_file(traits, ".o"), code)
    return _linked(code)


def _kept(traits: Traits) -> Entry:
    """From the cache. Raises OSError, ValueError."""
    with suppress(OSError, ValueError):
        return _mapped(_cache_file(traits, ".image"))
    with _opened(_cache_file(traits, ".o")) as (_, code):
        return _linked(code)


@contextmanager
def _alone_in_folder() -> Iterator[None]:
    """While no other process compiles for this user, or after a long time; on systems without
    such locks, and where the cache cannot be written, at once."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl

            _make_folder(folder := cache_folder())
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            latest = monotonic() + _LONGEST_WAIT
            while monotonic() < latest:
                with suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Explicitly, since a forked child may have the folder open still.
                    stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
                    break
                sleep(0.1)
        yield


@cache
def has_vnni() -> bool:
    """Whether this processor multiplies and adds four bytes at once in 512-bit vectors.

    Without it the kernels multiply in smaller steps, slower than onnxruntime does.
    """
    architecture, _, facts = processor().partition("\n")
    return architecture in _ARCHITECTURES and "avx512_vnni" in facts.split()


@cache
def has_halves() -> bool:
    """Whether this processor converts half precision, on which the kernels rely."""
    flags = [line.split() for line in processor().splitlines() if line.startswith("flags")]
    return "f16c" in flags[0] if flags else True  # it cannot be known


def _mapped(file: Path) -> Entry:
    """Raises OSError, ValueError."""
    with _opened(file) as (descriptor, code):
        pages = mmap.mmap(
            descriptor, len(code), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC
        )
    _keep(pages)
    return _function(np.frombuffer(pages, np.uint8).ctypes.data)


def _linked(code: bytes) -> Entry:
    """An object file, by llvmlite's loader."""
    llvm, target = _target()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _keep(engine)
    return _function(engine.get_function_address(_NAME))


def _keep(owner: Any) -> None:
    """Never frees an owner of code: threads run it while the interpreter is taken down."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def _function(address: int) -> Entry:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return kind(address)


def _compile(traits: Traits) -> bytes:
    """Raises ImportError when numba is not there or does not work, EngineNotInstalled when it is
    set to make other code."""
    from logging import getLogger

    if (room := room_mb()) < _COMPILING:  # LLVM ends the process when it gets none
        raise ImportError(
            f"compiling takes {_COMPILING} MiB of address space, the limit leaves {room:.0f}"
        )
    try:
        _refuse_settings()
        getLogger("edge_slm").warning(
            "compiling the kernels for this processor, once: 10 to 15 seconds, "
            "about a minute on older processors"
        )
        return _object_file(traits)
    except EngineNotInstalled:
        raise
    except Exception as error:
        raise ImportError(f"the kernels cannot be compiled: {error}") from error


def _refuse_settings() -> None:
    """Raises EngineNotInstalled when numba, by its environment, its file or the program, makes code
    in another way than by default, or for another processor than this: LLVM may end the process
    over it or take minutes, and the code would be kept for all that have the defaults."""
    import llvmlite.binding as llvm
    from numba import config
    from numba.core.registry import cpu_target

    config.reload_config()  # numba does so before it compiles
    usual = {**_SETTINGS, "CPU_NAME": (None, llvm.get_host_cpu_name())}
    for name, values in usual.items():
        found = getattr(config, name, values[0])
        if found not in values or getattr(found, "is_opt_max", False):  # "max" equals 3
            raise EngineNotInstalled(
                f"numba cannot be used: NUMBA_{name} is set",
                f"unset NUMBA_{name} for the first load, which compiles",
            )
    # Those of the target may come of earlier settings, or of numba's list of processors.
    *_, features = cpu_target.target_context.codegen().magic_tuple()
    if features != llvm.get_host_cpu_features().flatten():
        raise EngineNotInstalled(
            "numba cannot be used: it compiles for other features than this processor's",
            "unset NUMBA_CPU_NAME, NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX, if they are set",
        )


def _object_file(traits: Traits) -> bytes:
    from numba import cfunc, types

    from edge_slm_runtime.kernels.forward import make_forward
    from edge_slm_runtime.kernels.native import FAST
    from edge_slm_runtime.kernels.schedule import make_entry

    _keep_loops()  # before numba's own passes
    entry = make_entry(make_forward(has_vnni(), traits))
    start = cfunc(types.int64(types.int64, types.int64), **FAST)(entry)
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


@cache  # LLVM ends the process when an option is given twice
def _keep_loops() -> None:
    """Loops that clear memory stay loops: for processors without AVX-512 LLVM would make some of
    them calls of `memset`, which is outside of the code, so that there were no image of it."""
    import llvmlite.binding as llvm

    llvm.set_option("edge_slm", "-disable-loop-idiom-memset")


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
        processor().encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _cache_file(traits: Traits, suffix: str) -> Path:
    """Raises OSError for a user without a home."""
    return cache_folder() / (_key(traits) + suffix)


@contextmanager
def _opened(file: Path) -> Iterator[tuple[int, bytes]]:
    """A descriptor of cached code, and the code: of this user alone, and not damaged. What
    is checked is what is mapped, since the file is opened once.

    Raises OSError, ValueError.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(file, flags)
    try:
        _refuse_others(os.fstat(descriptor), file)
        _refuse_others(file.parent.stat(), file.parent)
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            content = stream.read()
        code = content[:-_DIGEST]
        if not code or hashlib.sha256(code).digest() != content[-_DIGEST:]:
            raise ValueError(f"{file} was altered")
        yield descriptor, code
    finally:
        os.close(descriptor)


def _refuse_others(found: os.stat_result, path: Path) -> None:
    """Raises ValueError when another user owns or may write `path`."""
    if not hasattr(os, "getuid"):  # Windows: the folder is below the user's own
        return
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise ValueError(f"another user can write {path}")


def _make_folder(folder: Path) -> None:
    """For this user alone: what it holds is going to be run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and stat.S_IMODE(folder.stat().st_mode) & 0o022:
        folder.chmod(0o700)


def _write(file: Path, code: bytes) -> None:
    _make_folder(file.parent)
    with write_aside(file, mode=0o600) as aside:
        aside.write_bytes(code + hashlib.sha256(code).digest())
