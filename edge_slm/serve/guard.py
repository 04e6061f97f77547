"""Which requests are accepted, and the JSON of errors."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_slm_runtime.errors import (
    EdgeSlmError,
    NotSupportedByEngine,
    OutOfMemory,
    RequestError,
    SessionFull,
)

_OPEN = ("/", "/health")  # without a key
_HERE = ("localhost", "127.0.0.1", "[::1]")
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An HTTP request that is not served: its status, our code, and what is wrong."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Guard:
    """Refuses calls without the key, calls that a page of another site can make without asking
    (a body that is not declared as JSON), and, when `local`, other names of this machine."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, local: bool, refused: Callable[[str], None]
    ) -> None:
        self._app, self._local, self._refused = app, local, refused
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (response := self._refusal(scope)):
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        given = headers.get("authorization", "").encode("latin-1")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if self._local and _name(headers.get("host", "")) not in _HERE:
            return self._error(403, "host_refused", "only names of this machine are answered")
        if (
            self._expected
            and scope["path"] not in _OPEN
            and not hmac.compare_digest(given, self._expected)
        ):
            return self._error(401, "invalid_api_key", "give the key as 'Authorization: Bearer …'")
        if scope["method"] == "POST" and kind != "application/json":
            return self._error(415, "not_json", "give 'Content-Type: application/json'")
        return None

    def _error(self, status: int, code: str, message: str) -> Response:
        self._refused(code)
        return error_response(status, code, message)


def _name(host: str) -> str:
    """Without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def status_of(error: EdgeSlmError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, SessionFull):
        return 429
    if isinstance(error, RequestError | NotSupportedByEngine):
        return 400
    return 503 if isinstance(error, OutOfMemory) else 500


def error_response(status: int, code: str, message: str) -> Response:
    """The body of `error_body`."""
    headers = {"retry-after": "1"} if status == 429 else {}
    return json_response(error_body(status, code, message), status, headers)


def error_body(status: int, code: str, message: str) -> dict[str, Any]:
    """In OpenAI's shape, with our code."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`data` as a body."""
    return Response(json_bytes(data), status, headers, "application/json")


def json_bytes(data: Any) -> bytes:
    """In UTF-8, what it cannot spell as escapes."""
    return json.dumps(data, ensure_ascii=False).encode("utf-8", "backslashreplace")
