"""A session: callers of several threads share a model, which decodes their answers together.

One thread decodes. It takes what is waiting, first come first served, as soon as a row gets
free, and leaves the pieces of each answer at its stream, so it waits for no reader.

There are no locks: each change of a list is a single operation, which nothing interrupts, so
that signal handlers and finalisers may submit and cancel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from threading import Thread, current_thread
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edge_slm_runtime.answer import Answer, Step
from edge_slm_runtime.bound import Bound
from edge_slm_runtime.errors import EngineError, SessionFull
from edge_slm_runtime.records import Generation, Request
from edge_slm_runtime.wakeup import Wakeup

if TYPE_CHECKING:
    from edge_slm_runtime.generate import SLM


class SessionStream(Bound, Iterator[str], AsyncIterator[str]):
    """The answer to a submitted request: its text piece by piece, with `for` or `async for`, and
    `result`, or `await` of it. The pieces joined are exactly `result.text`; who reads slowly gets
    longer ones.

    Raises what ends the answer before its time: EngineError, OutOfMemory. Left with `with`, it
    is cancelled.
    """

    def __init__(self, session: Session, answer: Answer) -> None:
        self._session = session
        self._answer: Answer | None = answer
        self._pieces: deque[str] = deque()
        self._end: Generation | Exception | None = None
        self._news = Wakeup()

    @property
    def result(self) -> Generation:
        """The answer and its metadata. Waits for its end."""
        self._wait(lambda: self._end)
        return self._ended()

    @property
    def done(self) -> bool:
        """Whether the answer has ended; its pieces may still be unread."""
        return self._end is not None

    def cancel(self) -> None:
        """Ends the answer with the pass of the model that is under way, with `finish_reason`
        `cancelled`; what it is until then can be read. May be called from anywhere."""
        if answer := self._answer:
            answer.cancelled = True
            self._session._end_waiting(self)

    def __next__(self) -> str:
        while (piece := self._piece()) is None:
            self._wait(self._has_news)
        if piece:
            return piece
        raise StopIteration

    def __aiter__(self) -> SessionStream:
        return self

    async def __anext__(self) -> str:
        while (piece := self._piece()) is None:
            await self._news.awaited(self._has_news)
        if piece:
            return piece
        raise StopAsyncIteration

    def __await__(self) -> Generator[Any, None, Generation]:
        """`result`; a task that is cancelled while it waits cancels the answer."""
        try:
            yield from self._news.awaited(lambda: self._end).__await__()
        except BaseException:
            self.cancel()
            raise
        return self._ended()

    def __enter__(self) -> SessionStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def _wait(self, ready: Callable[[], object]) -> None:
        if not ready() and self._session.decodes_here:
            raise EngineError("a finaliser must not wait for an answer of a session")
        self._news.wait(ready)

    def _has_news(self) -> bool:
        return bool(self._pieces) or self._end is not None

    def _piece(self) -> str | None:
        """What has come since the last one, "" at the end of all, None if nothing has come yet."""
        end = self._end  # before the pieces: the last of them comes first
        pieces = []
        with suppress(IndexError):
            while True:
                pieces.append(self._pieces.popleft())
        if pieces:
            return "".join(pieces)
        if isinstance(end, Exception):
            raise end
        return None if end is None else ""

    def _ended(self) -> Generation:
        if isinstance(self._end, Exception):
            raise self._end
        assert self._end is not None
        return self._end

    def _give(self, text: str, end: Generation | Exception | None) -> None:
        if text:
            self._pieces.append(text)
        if end is not None:
            self._end, self._answer = end, None
        if text or end:
            self._news()


class Session(Bound):
    """Made by `SLM.session`. `submit` may be called from anywhere; left with `with`, the session
    waits for all answers, or cancels them when an error leaves it."""

    def __init__(self, slm: SLM, rows: int, most_waiting: int) -> None:
        self._slm, self._rows, self._most_waiting = slm, rows, most_waiting
        self._waiting: list[SessionStream] = []
        self._running: list[SessionStream] = []
        self._closed = self._over = False
        self._news = Wakeup()
        self._thread = Thread(target=self._work, name="edge-slm session", daemon=True)
        self._thread.start()

    @property
    def decodes_here(self) -> bool:
        """Whether the calling thread is the one that decodes: a finaliser may run in it."""
        return self._thread is current_thread()

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    def submit(self, request: str | Request, **settings: Any) -> SessionStream:
        """Has a request answered; settings: the other fields of `Request`. Does not wait.

        `deadline_ms` and the timings count from here. Raises as `SLM.generate`; SessionFull when
        as many requests wait as may (a few more get in when several threads submit at once), and
        EngineError when the session is closed.
        """
        if self._closed:
            raise EngineError("the session is closed", "open another one")
        if len(self._waiting) >= self._most_waiting:
            raise SessionFull(
                f"{self._most_waiting} requests are waiting", "try again when one has ended"
            )
        answer = self._slm._answer(Request.of(request, **settings))
        answer.can_wait = False
        stream = SessionStream(self, answer)
        self._waiting.append(stream)
        self._news()
        if self._over:  # closed meanwhile
            stream.cancel()
        return stream

    def close(self, *, cancel: bool = False) -> None:
        """Takes no more requests and waits until those that it has are answered, or cancelled."""
        self._closed = True
        if cancel:
            for stream in (*self._waiting, *self._running):
                stream.cancel()
        self._news()
        if not self.decodes_here:
            self._thread.join()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(cancel=kind is not None)

    # -- of the decoding thread, but for `_end_waiting` ---------------------------------

    def _work(self) -> None:
        while True:
            self._news.wait(lambda: self._waiting or self._closed)
            if not self._waiting:
                break
            try:
                for step in self._slm._decode(_Drawn(self), self._rows):
                    self._take(step)
            except Exception as error:
                self._fail(error)
        self._over = True
        for stream in tuple(self._waiting):  # submitted as the session was being closed
            stream.cancel()

    def _draw(self) -> Answer | None:
        """The answer of the next request. Waits for one if no other is being decoded."""
        while True:
            with suppress(IndexError):
                stream = self._waiting[0]
                self._running.append(stream)  # first: `close` must find it in one of the two
                answer = stream._answer
                try:
                    self._waiting.remove(stream)
                except ValueError:  # cancelled meanwhile
                    self._running.remove(stream)
                    continue
                return answer
            if self._running or self._closed:
                return None
            self._news.wait(lambda: self._waiting or self._closed)

    def _take(self, step: Step) -> None:
        stream = next(one for one in self._running if one._answer is step.answer)
        if stream is self._running[0]:  # once a pass
            for late in tuple(self._waiting):
                if (answer := late._answer) and answer.called_off:
                    self._end_waiting(late)
        if step.done:
            self._running.remove(stream)
        stream._give(step.text, self._slm._result_of(step.answer) if step.done else None)

    def _fail(self, error: Exception) -> None:
        """Ends what an engine that has failed was computing, or else would have drawn next."""
        failed, self._running = self._running, []
        with suppress(IndexError):
            failed = failed or [self._waiting.pop(0)]
        for stream in failed:
            stream._give("", error)

    def _end_waiting(self, stream: SessionStream) -> None:
        """Ends an answer that has been called off, unless it is being decoded or has ended."""
        answer = stream._answer
        try:
            self._waiting.remove(stream)
        except ValueError:
            return
        assert answer is not None
        stream._give(answer.end().text, self._slm._result_of(answer))


class _Drawn(Iterator[Answer]):
    """The requests of a session: at its end when none waits, and later it may have more."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __next__(self) -> Answer:
        if answer := self._session._draw():
            return answer
        raise StopIteration
