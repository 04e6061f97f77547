"""A model in a process of its own: a native crash, or an answer that never ends, is an EngineError
and a restart, not the end of the program.

That process reads calls from stdin and writes what becomes of them to stdout, both as pickles: the
two processes are one program.
"""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from struct import Struct
from threading import Lock, Timer, get_ident
from types import TracebackType
from typing import IO, Any, NamedTuple

from edge_slm_runtime import errors
from edge_slm_runtime.bound import Bound
from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.records import Generation, Request

_SIZE = Struct("<Q")  # bytes of the message that follows
TIMEOUT = 300.0  # seconds without a word of it; the numba engine compiles at its first load


class _Loaded(NamedTuple):
    """What the process says of its model."""

    manifest: Manifest
    variant: Variant
    threads: int


class _Failed(NamedTuple):
    """An exception: the name of its class in `errors`, or of a builtin one, and what it said."""

    kind: str
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, error: BaseException) -> _Failed:
        if isinstance(error, errors.EdgeSlmError):
            return cls(type(error).__name__, (error.problem, error.hint))
        kind = "TypeError" if isinstance(error, TypeError) else "RuntimeError"
        return cls(kind, (f"{type(error).__name__}: {error}",))

    def error(self) -> Exception:
        builtin = {"TypeError": TypeError, "RuntimeError": RuntimeError}
        made: Exception = (builtin.get(self.kind) or getattr(errors, self.kind))(*self.arguments)
        return made


class IsolatedSLM(Bound):
    """A bundle loaded in another process; made by `edge_slm.load(isolate=True)`.

    Answers one caller at a time; others wait. After a crash, the call that saw it raises
    EngineError and the next one loads the model again. timeout_s: seconds without a word of
    the process after which it is killed. options: of `load`, which also says what is raised.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, timeout_s: float = TIMEOUT, **options: Any
    ) -> None:
        self._call = pickle.dumps((os.fspath(path), options))
        self._timeout_s = timeout_s
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._owner: int | None = None  # the thread whose answer is under way
        self._loaded = self._start()

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return self._loaded.manifest

    @property
    def variant(self) -> Variant:
        """The one that was loaded last."""
        return self._loaded.variant

    @property
    def schema(self) -> CommandSchema:
        """The command grammar. Raises NoCommandGrammar for a model without one."""
        return self.manifest.prompt.grammar

    @property
    def threads(self) -> int:
        """Compute threads of the engine."""
        return self._loaded.threads

    def generate(self, request: str | Request, **settings: Any) -> Generation:
        """As `SLM.generate`; EngineError also when the process ends or says nothing."""
        (answer,) = self.generate_batch([Request.of(request, **settings)], 1)
        return answer

    def generate_batch(
        self, requests: Iterable[str | Request], batch_size: int = 8, **settings: Any
    ) -> Iterator[Generation]:
        """As `SLM.generate_batch`, of requests that are all drawn before the first answer."""
        if isinstance(requests, str | Request):
            raise errors.BadSetting("requests is a single request", "give a list of them")
        asked = [Request.of(request, **settings) for request in requests]
        for message in self._ask("batch", asked, batch_size):
            assert isinstance(message, Generation)
            yield message

    def variations(self, request: str | Request, n: int = 4, **settings: Any) -> list[Generation]:
        """As `SLM.variations`."""
        return list(self._ask("variations", Request.of(request, **settings), n))

    def stream(self, request: str | Request, **settings: Any) -> Iterator[str | Generation]:
        """The pieces of the text as they become sure, then the Generation. Closing the iterator
        ends the work on the answer."""
        for message in self._ask("stream", Request.of(request, **settings)):
            assert isinstance(message, str | Generation)
            yield message

    def close(self) -> None:
        """Ends the process; a later call raises EngineError."""
        self._closed = True
        self._kill()

    def __enter__(self) -> IsolatedSLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- the process --------------------------------------------------------------

    def _ask(self, *call: Any) -> Iterator[Any]:
        """The messages of the process about a call, until its last one, which is None."""
        if self._owner == get_ident():  # it would wait for itself
            raise errors.EngineError("an answer of this thread is not complete", "end it first")
        with self._lock:
            if self._closed:
                raise errors.EngineError("the model is closed", "load it again")
            self._owner = get_ident()
            if self._process is None or self._process.poll() is not None:
                self._kill()  # closes the pipes
                self._loaded = self._start()
            process = self._process
            assert process is not None
            ended = False
            try:
                self._send(process, call)
                while (message := self._receive(process)) is not None:
                    yield message
                ended = True
            except GeneratorExit:
                with suppress(OSError, errors.EngineError):
                    self._send(process, "cancel")
                    while self._receive(process) is not None:
                        pass
                    ended = True
                raise
            except Exception:
                ended = process.poll() is None  # it has said what is wrong, and goes on
                raise
            finally:
                self._owner = None
                if not ended:
                    self._kill()

    def _start(self) -> _Loaded:
        executable, environment = interpreter()
        self._process = subprocess.Popen(
            [executable, "-c", f"from {__name__} import serve; serve()"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self._send(self._process, pickle.loads(self._call))
            loaded = self._receive(self._process)
        except BaseException:
            self._kill()
            raise
        assert isinstance(loaded, _Loaded)
        return loaded

    def _send(self, process: subprocess.Popen[bytes], message: Any) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: reading says how
            _write(process.stdin, message)

    def _receive(self, process: subprocess.Popen[bytes]) -> Any:
        """Raises what the process raised, and EngineError when it ended or said nothing."""
        assert process.stdout is not None
        watchdog = Timer(self._timeout_s, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            message = _read(process.stdout)
        except (EOFError, OSError, ValueError):
            silent = not watchdog.is_alive() and not self._closed
            status = process.wait()
            how = f"said nothing for {self._timeout_s:g} s" if silent else _end(status)
            raise errors.EngineError(
                f"the process of the model {how}", "the next call starts another one"
            ) from None
        finally:
            watchdog.cancel()
        if isinstance(message, _Failed):
            raise message.error()
        return message

    def _kill(self) -> None:
        if (process := self._process) is None:
            return
        self._process = None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


def interpreter() -> tuple[str, dict[str, str]]:
    """Python and the environment for a process that imports what this one does. Raises
    EngineError in a frozen app, which would start itself again and again."""
    if getattr(sys, "frozen", False):
        raise errors.EngineError(
            "a frozen app has no Python to start another process with",
            "load without isolate; install models with Python",
        )
    return sys.executable, {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _end(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _write(pipe: IO[bytes], message: Any) -> None:
    content = pickle.dumps(message)
    pipe.write(_SIZE.pack(len(content)) + content)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Any:
    """Raises EOFError at the end of the pipe."""
    (size,) = _SIZE.unpack(_exactly(pipe, _SIZE.size))
    return pickle.loads(_exactly(pipe, size))


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        if not (piece := pipe.read(size - len(content))):
            raise EOFError
        content += piece
    return bytes(content)


def _serve(calls: IO[bytes], out: IO[bytes]) -> None:
    from edge_slm_runtime.loading import load

    try:
        path, options = _read(calls)
        slm = load(path, **options)
    except Exception as error:
        _write(out, _Failed.of(error))
        return
    with slm:
        _write(out, _Loaded(slm.manifest, slm.variant, slm.threads))
        while True:
            try:
                call = _read(calls)
            except EOFError:
                return
            if call == "cancel":  # of an answer that was complete by then
                continue
            try:
                _answer(slm, call, calls, out)
            except Exception as error:
                _write(out, _Failed.of(error))
            else:
                _write(out, None)


def _answer(slm: Any, call: tuple[Any, ...], calls: IO[bytes], out: IO[bytes]) -> None:
    kind, what, *rest = call
    if kind == "variations":
        for answer in slm.variations(what, *rest):
            _write(out, answer)
        return
    if kind == "batch":
        answers = slm.generate_batch(what, *rest)
        for answer in answers:
            _write(out, answer)
            if _cancelled(calls):
                answers.close()
                return
        return
    stream = slm.stream(what)
    for piece in stream:
        _write(out, piece)
        if _cancelled(calls):
            stream.close()
            return
    _write(out, stream.result)


def _cancelled(calls: IO[bytes]) -> bool:
    """Whether there is another message: while an answer is computed there is but one."""
    if os.name != "posix":  # elsewhere pipes cannot be asked
        return False
    if not select.select([calls], [], [], 0)[0]:
        return False
    with suppress(EOFError):
        _read(calls)
    return True


def serve() -> None:
    """What the process does: loads the model of the first call, then answers the others."""
    # What a library prints must not come between messages.
    with os.fdopen(os.dup(1), "wb") as out, os.fdopen(os.dup(0), "rb", buffering=0) as calls:
        os.dup2(2, 1)
        _serve(calls, out)  # unbuffered, so that `select` sees what has not been read
