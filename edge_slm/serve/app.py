"""The routes, as an ASGI application around a session."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edge_slm.serve.bodies import SETTINGS, Asked, chat_body, completion_body, prompts_body
from edge_slm.serve.forms import Chat, Completion, Form, Prompts
from edge_slm.serve.guard import (
    Guard,
    Refusal,
    error_body,
    error_response,
    json_bytes,
    json_response,
    status_of,
)
from edge_slm.serve.metrics import Metrics
from edge_slm_runtime import SLM, EdgeSlmError, Generation, Session, SessionStream
from edge_slm_runtime.description import task_lengths
from edge_slm_runtime.errors import RequestNotText, shown

_LONGEST = 1 << 20  # bytes of a body
_PAGE = Path(__file__).with_name("playground.html")
Body = Callable[[dict[str, Any]], Asked]
Event = tuple[int, str | Generation]


def application(
    slm: SLM,
    session: Session,
    *,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    local: bool = False,
) -> Starlette:
    """api_key: asked of all but the page and /health. origins: whose pages may call, CORS.
    local: only a Host of this machine is answered, so that no page of elsewhere gets in through
    a name that it points here (DNS rebinding)."""
    api = _Api(slm, session)
    middleware = [Middleware(Guard, api_key=api_key, local=local, refused=api.metrics.refused)]
    if origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=[
            Route("/", _page),
            Route("/health", api.health),
            Route("/metrics", api.metrics_page),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/prompts", api.answering(prompts_body, Prompts), methods=["POST"]),
            Route("/v1/completions", api.answering(completion_body, Completion), methods=["POST"]),
            Route("/v1/chat/completions", api.answering(chat_body, Chat), methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={
            EdgeSlmError: api.failed,
            Refusal: api.refused,
            HTTPException: api.not_routed,
        },
    )


async def _page(request: HttpRequest) -> Response:
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    headers = {"content-security-policy": f"{policy}; connect-src 'self'"}
    return Response(_PAGE.read_bytes(), media_type="text/html", headers=headers)


class _Api:
    """The endpoints."""

    def __init__(self, slm: SLM, session: Session) -> None:
        self._slm, self._session = slm, session
        self.metrics = Metrics(session)
        self._counting: set[asyncio.Task[None]] = set()

    async def health(self, request: HttpRequest) -> Response:
        running, waiting = self._session.running, self._session.waiting
        return json_response({"status": "ok", "running": running, "waiting": waiting})

    async def metrics_page(self, request: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: HttpRequest) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        self._check_model(request.path_params["name"])
        return json_response(self._model())

    def answering(
        self, body: Body, form: Callable[[str, Asked], Form]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """The endpoint that reads such a body and answers in such a form."""

        async def endpoint(request: HttpRequest) -> Response:
            given = await _json(request)
            if (name := given.get("model")) is not None:
                self._check_model(name)
            asked = body(given)
            streams = self._submit(asked)
            told = form(self._slm.manifest.name, asked)
            if asked.stream:
                return StreamingResponse(
                    self._events(told, streams),
                    media_type="text/event-stream",
                    headers={"cache-control": "no-cache"},
                    background=BackgroundTask(_left, streams),
                )
            return json_response(told.whole(asked.best(await _results(request, streams))))

        return endpoint

    async def failed(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, EdgeSlmError)
        self.metrics.refused(error.code)
        return error_response(status_of(error), error.code, str(error))

    async def refused(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        self.metrics.refused(error.code)
        return error_response(error.status, error.code, str(error))

    async def not_routed(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        message = f"{request.method} {request.url.path}: {error.detail}"
        return await self.refused(request, Refusal(error.status_code, code, message))

    def _model(self) -> dict[str, Any]:
        manifest = self._slm.manifest
        schema = manifest.prompt.schema
        return {
            "id": manifest.name,
            "object": "model",
            "created": 0,
            "owned_by": "edge_slm",
            "variant": self._slm.variant.name,
            "context": manifest.model.positions,
            "seeds": self._slm.seeds,
            "tasks": task_lengths(schema) if schema else {},
            "settings": sorted(SETTINGS),
        }

    def _check_model(self, name: object) -> None:
        if name != self._slm.manifest.name:
            known = self._slm.manifest.name
            message = f"there is no model {shown(name)} (this server has {known!r})"
            raise Refusal(404, "model_not_found", message)

    def _submit(self, asked: Asked) -> list[SessionStream]:
        """All of them or none."""
        streams: list[SessionStream] = []
        try:
            for request in asked.requests:
                streams.append(self._session.submit(request))
        except BaseException:
            _cancel(streams)
            raise
        for stream in streams:
            task = asyncio.ensure_future(self._count(stream))
            self._counting.add(task)
            task.add_done_callback(self._counting.discard)
        return streams

    async def _count(self, stream: SessionStream) -> None:
        try:
            self.metrics.answered(await stream)
        except EdgeSlmError as error:
            self.metrics.refused(error.code)

    async def _events(self, form: Form, streams: Sequence[SessionStream]) -> AsyncIterator[bytes]:
        """Server-sent events. When the client leaves, the answers are cancelled."""
        results: list[Generation | None] = [None] * len(streams)
        try:
            for index in range(len(streams)):
                if opening := form.opening(index):
                    yield _event(opening)
            async for index, what in _merged(streams):
                if isinstance(what, str):
                    yield _event(form.piece(index, what))
                else:
                    results[index] = what
                    yield _event(form.end(index, what))
            if closing := form.closing([result for result in results if result]):
                yield _event(closing)
        except EdgeSlmError as error:
            yield _event(error_body(500, error.code, str(error)))
        finally:
            _cancel(streams)
        yield b"data: [DONE]\n\n"


async def _json(request: HttpRequest) -> dict[str, Any]:
    """The body. Raises RequestNotText, Refusal."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > _LONGEST:
            message = f"the body has more than {_LONGEST >> 20} MiB"
            raise Refusal(413, "body_too_long", message)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestNotText(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestNotText("the body is not a JSON object")
    return body


async def _results(request: HttpRequest, streams: Sequence[SessionStream]) -> list[Generation]:
    """Of all streams, which are cancelled when the client leaves."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        _cancel(streams)

    watching = asyncio.ensure_future(watch())
    try:
        return [await stream for stream in streams]
    finally:
        watching.cancel()
        _cancel(streams)


async def _merged(streams: Sequence[SessionStream]) -> AsyncIterator[Event]:
    """(index, piece) of all as they come, and (index, result) at the end of each."""
    came: asyncio.Queue[Event | EdgeSlmError] = asyncio.Queue()

    async def read(index: int, stream: SessionStream) -> None:
        try:
            async for piece in stream:
                came.put_nowait((index, piece))
            came.put_nowait((index, await stream))
        except EdgeSlmError as error:
            came.put_nowait(error)

    tasks = [asyncio.ensure_future(read(*one)) for one in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            event = await came.get()
            if isinstance(event, EdgeSlmError):
                raise event
            left -= not isinstance(event[1], str)
            yield event
    finally:
        for task in tasks:
            task.cancel()


def _cancel(streams: Sequence[SessionStream]) -> None:
    for stream in streams:
        stream.cancel()


async def _left(streams: Sequence[SessionStream]) -> None:
    """Also when the client has left before the first event."""
    _cancel(streams)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(data) + b"\n\n"
