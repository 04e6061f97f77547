"""What a test does in a process of its own, since a failure may take the process down."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_LONGEST = 60  # seconds of the processor
_DEADLOCK = 280.0  # seconds, of a machine that has other work too
_MEMORY = 8 << 30  # bytes of address space
_context = multiprocessing.get_context("forkserver")
# Imported once, by the process from which the others are forked; this module is not, nor are
# those of the tests, which take longer to import than a try takes.
_context.set_forkserver_preload(
    [
        *("edge_slm_runtime.engines.numba_engine", "edge_slm_runtime.engines.onnx", "numpy.random"),
        *("edge_slm_runtime.engines.ct2", "edge_slm_converters.checkpoint", "safetensors", "gguf"),
        *("onnxruntime", "ctranslate2", "llvmlite.binding", "encodings.ascii", "resource"),
    ]
)


class Crash(AssertionError):
    """The process ended by itself."""


class Hang(AssertionError):
    """It took too long."""


def outcome(function: Callable[..., Any], *arguments: Any) -> str:
    """ "" when `function` returns, or the code of its EdgeSlmError.

    Fails for every other error; raises Crash when the process ends by a signal, Hang when it takes
    too long. The function is one of this module.
    """
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_report, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(_DEADLOCK):
            raise Hang(f"no answer in {_DEADLOCK:g} s")
        code, told = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            raise Hang(f"it computed for {_LONGEST} s") from None
        raise Crash(f"the process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    assert not told, told
    return str(code)


def _report(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Sends the code of an error, and what else has happened."""
    import resource

    from edge_slm_runtime.errors import EdgeSlmError

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    # At the first limit comes SIGXCPU, which `outcome` calls a hang; at the second SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (_LONGEST, _LONGEST + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        function(*arguments)
    except EdgeSlmError as error:
        sender.send((error.code, "" if len(str(error)) < 2000 else "a long message"))
    except BaseException:
        sender.send(("", traceback.format_exc()))
    else:
        sender.send(("", ""))


def answer(bundle: Path, engine: str, precision: str, memory: float | None = None) -> None:
    """Loads a variant, and does with it all that reads the manifest or computes."""
    from edge_slm_runtime import Request, load, read_manifest

    manifest = read_manifest(bundle)
    assert read_manifest(bundle).to_json() == manifest.to_json()
    with load(bundle, engine, precision, threads=1, max_memory_mb=memory) as slm:
        slm.generate("a cosy cabin in Zürich 東京", max_new_tokens=12)
        slm.generate("neon street", temperature=0.8, top_p=0.9, max_new_tokens=6)
        if slm.manifest.prompt.schema:
            slm.generate("a cat", task="image", words=3, relevance=2, max_new_tokens=6)
        list(slm.generate_batch([Request("a", max_new_tokens=3), Request("neon")], 2))
        for golden in slm.manifest.goldens[:1]:
            slm.greedy_ids(golden.request, golden.command, min(golden.max_new_tokens, 8))


def read_checkpoint(path: Path) -> None:
    from edge_slm_converters.checkpoint import read_checkpoint as read

    read(path).digests()
