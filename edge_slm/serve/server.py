"""Serves on a socket until SIGINT or SIGTERM."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from edge_slm.serve.app import application
from edge_slm_runtime import SLM

GRACE = 10  # seconds for answers under way after the signal to stop


def serve(
    slm: SLM,
    host: str,
    port: int,
    *,
    rows: int,
    waiting: int,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    ready: Callable[[str, bool], None],
) -> None:
    """Until SIGTERM or Ctrl-C: then no more connections are taken, answers under way have GRACE
    seconds, and it returns. A second signal ends it at once.

    port: 0 is a free one. rows, waiting: of `SLM.session`. ready: called when it is listening,
    with the address and whether only this machine can reach it. Raises OSError when the address
    cannot be had.
    """
    with _listening(host, port) as sock, slm.session(rows, waiting) as session:
        name, number = sock.getsockname()[:2]
        local = name == "::1" or name.startswith("127.")
        app = application(slm, session, api_key=api_key, origins=origins, local=local)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE,
            )
        )
        with _ending_quietly():
            ready(f"http://{f'[{name}]' if ':' in name else name}:{number}", local)
            server.run(sockets=[sock])
        session.close(cancel=True)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that takes connections before the server looks at them."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), f"{host}:{port}") from None
    with sock:
        yield sock


@contextmanager
def _ending_quietly() -> Iterator[None]:
    """uvicorn raises the signals that ended it once more, for the handlers before it."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(one, lambda *_: None) for one in signals]
    try:
        yield
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
