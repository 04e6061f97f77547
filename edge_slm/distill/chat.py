"""A client of OpenAI-compatible chat servers for many prompts at once.

Every answer goes to a journal, so that stopped work continues where it was. Failures that
may be temporary (a dropped connection, a time-out, 408, 409, 429, 5xx, an unreadable body)
are retried after a growing, jittered pause; any other refusal stops the work at once.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_slm.journal import Journal
from edge_slm.progress import Progress
from edge_slm_runtime.errors import BadSetting, DataError, DependencyMissing, TeacherError, shown

_AHEAD = 4  # requests taken from the caller in advance, as a multiple of the concurrency
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # s
_LONGEST_WAIT = 600.0  # s; a server that asks for more is given up


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """messages: (role, content) pairs, the last one the user's."""

    messages: tuple[tuple[str, str], ...]
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0

    def key(self, model: str) -> str:
        """Digest of everything that decides the answer."""
        canonical = json.dumps([model, asdict(self)], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of an answer. cut: it reached max_tokens."""

    prompt: ChatRequest
    text: str
    cut: bool = False


class _Retry(Exception):
    """A failure that may be temporary; wait: seconds that the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Chat:
    """One model behind one server.

    base_url: such as http://127.0.0.1:8000/v1. api_key: None takes $OPENAI_API_KEY.
    timeout: seconds until an answer must be complete. retries: after the first attempt.
    journal: a JSONL file of raw answers; a request in it is not sent again.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        journal: Path | None = None,
    ) -> None:
        if not re.match(r"https?://[^/\s:]+(:\d{1,5})?(/|$)|https?://\[", base_url):
            raise BadSetting(
                f"{shown(base_url)} is not the address of a server",
                "give something like http://127.0.0.1:8000/v1",
            )
        try:
            import openai  # noqa: F401
        except ImportError:
            raise DependencyMissing(
                "talking to a server needs openai", "pip install 'edge-slm[train]'"
            ) from None
        self.base_url, self.model = base_url.rstrip("/"), model
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next_turn = 0.0  # monotonic time before which nothing is sent
        self._path = journal
        self._journal: Journal | None = None  # open while asking
        self._known: dict[str, tuple[str, bool]] = {}  # key → (text, cut)

    def ask(
        self, prompts: Iterable[ChatRequest], progress: Progress | None = None
    ) -> Generator[Reply, None, None]:
        """The replies in the order of the prompts, as they arrive.

        Leaving the iteration (Ctrl-C too) cancels the requests under way. Raises TeacherError,
        which names the server (answers until then are in the journal), and DataError when
        another process is writing the journal.
        """
        total = len(prompts) if isinstance(prompts, (list, tuple)) else 0
        source = iter(prompts)
        with self._session() as submit:
            window: deque[tuple[ChatRequest, str, Future[None] | None]] = deque()
            asked: dict[str, Future[None]] = {}
            done = 0
            while True:
                while len(window) < _AHEAD * self._concurrency:
                    if (prompt := next(source, None)) is None:
                        break
                    key = prompt.key(self.model)
                    if key not in self._known and key not in asked:
                        asked[key] = submit(prompt, key)
                    window.append((prompt, key, asked.get(key)))
                if not window:
                    return
                prompt, key, future = window.popleft()
                if future is not None:
                    future.result()
                    asked.pop(key, None)
                done += 1
                if progress is not None:
                    progress(done, total)
                text, cut = self._known[key]
                yield Reply(prompt, text, cut)

    @contextmanager
    def _session(self) -> Iterator[Callable[[ChatRequest, str], Future[None]]]:
        """An event loop in a thread of its own: requests go on while the caller is busy."""
        from openai import AsyncOpenAI

        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="chat", daemon=True)
        thread.start()
        client = AsyncOpenAI(
            base_url=self.base_url, api_key=self._api_key, timeout=self._timeout, max_retries=0
        )
        slots = asyncio.Semaphore(self._concurrency)

        async def answer(prompt: ChatRequest, key: str) -> None:
            async with slots:
                await self._answer(client, prompt, key)

        async def close() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close()

        try:
            if self._path is not None:
                self._journal = Journal(self._path)
                try:
                    self._known = {
                        row["key"]: (row["text"], row["cut"]) for row in self._journal.rows()
                    }
                except KeyError:
                    raise DataError(f"{self._path} is no journal of answers") from None
            yield lambda prompt, key: asyncio.run_coroutine_threadsafe(answer(prompt, key), loop)
        finally:
            asyncio.run_coroutine_threadsafe(close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            if self._journal is not None:
                self._journal.close()
                self._journal = None

    async def _answer(self, client: Any, prompt: ChatRequest, key: str) -> None:
        """Sends a prompt until there is an answer, and stores that."""
        for attempt in range(self._retries + 1):
            await self._turn()
            try:
                text, cut, raw = await self._send(client, prompt)
                break
            except _Retry as error:
                if error.wait > _LONGEST_WAIT:
                    raise TeacherError(
                        f"{self.base_url} asks to wait {error.wait:.0f} s", "start again then"
                    ) from None
                if attempt == self._retries:
                    raise TeacherError(
                        f"{self.base_url} failed {attempt + 1} times in a row, last: {error}",
                        "see the server's log; answers so far are kept, start again to continue",
                    ) from None
                # All requests wait if the server asked for it, else this one alone.
                self._next_turn = max(self._next_turn, time.monotonic() + error.wait)
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)
                await asyncio.sleep(max(error.wait, random.uniform(pause / 2, pause)))
        if self._journal is not None:
            question = prompt.messages[-1][1]
            row = {"key": key, "text": text, "cut": cut, "question": question, "raw": raw}
            self._journal.append(row)
        self._known[key] = (text, cut)

    async def _turn(self) -> None:
        """Waits until the rate limit and the server allow the next request."""
        while (wait := self._next_turn - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._next_turn = time.monotonic() + self._interval

    async def _send(self, client: Any, prompt: ChatRequest) -> tuple[str, bool, Any]:
        """(text, cut, raw answer). Raises _Retry, and TeacherError for a permanent failure."""
        import openai

        call = client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=[{"role": role, "content": content} for role, content in prompt.messages],
            temperature=prompt.temperature,
            max_tokens=prompt.max_tokens,
            seed=prompt.seed,
        )
        try:
            # The time-out of the client is between two bytes; this one is for the answer.
            response = await asyncio.wait_for(call, self._timeout)
        except (openai.APITimeoutError, asyncio.TimeoutError, TimeoutError):
            raise _Retry(f"no answer within {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _Retry(f"no connection: {error.__cause__ or error}") from None
        except openai.APIStatusError as error:
            status = error.status_code
            message = error.message.removeprefix(f"Error code: {status}").lstrip(" -")
            reason = f"{status} {shown(message)}" if message else str(status)
            if status in (408, 409, 429) or status >= 500:
                raise _Retry(reason, _retry_after(error.response.headers)) from None
            raise TeacherError(
                f"{self.base_url} refused a prompt for model {self.model!r}: {reason}",
                "check the address (it usually ends in /v1), the model's name and the key",
            ) from None
        return _read(response.http_response.content)


def _read(body: bytes) -> tuple[str, bool, Any]:
    """(text, cut, raw) of a chat completion.

    Also of an event stream: `transformers serve` always sends one.
    """
    try:
        if body.lstrip().startswith(b"data:"):
            lines = [line[5:].strip() for line in body.splitlines() if line.startswith(b"data:")]
            raw: Any = [json.loads(line) for line in lines if line != b"[DONE]"]
            choices = [event["choices"][0] for event in raw if event["choices"]]
            text = "".join(choice["delta"].get("content") or "" for choice in choices)
            reason = choices[-1]["finish_reason"]  # missing: the stream was interrupted
        else:
            raw = json.loads(body)
            choice = raw["choices"][0]
            # null when a model spent all tokens on reasoning
            text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
        if not isinstance(text, str):
            raise TypeError(text)  # noqa: TRY301
        text.encode()  # no half characters
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise _Retry(f"an unreadable answer: {shown(body)}") from None
    return text, reason == "length", raw


def _retry_after(headers: Any) -> float:
    """Seconds; the header holds a number of them or a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
