"""A chat server on loopback that counts what it is asked, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = "red fox snow lamp river quiet gold stone wind paper blue door morning tall glass".split()


def completion(text: str, finish: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "x", "choices": [{**choice, "finish_reason": finish}]}).encode()


def answer_to(body: dict[str, Any]) -> str:
    """A text that depends on the whole question and on nothing else."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
    lines = [" ".join(WORDS[b % len(WORDS)] for b in digest[i : i + 4]) for i in range(0, 24, 4)]
    return "\n".join(lines) if "one a line" in body["messages"][-1]["content"] else lines[0]


class ChatServer(ThreadingHTTPServer):
    """troubles: what to do to the next requests, before answering properly.

    "garbage", "html", "no choices", "half", "drop", "hang", "broken stream", or a
    status, or (status, headers).
    """

    daemon_threads = True

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.delay = delay  # s, per answer
        self.troubles: deque[Any] = deque()
        self.seen: list[tuple[float, dict[str, Any]]] = []  # (monotonic time, body)
        self.released = threading.Event()  # ends what hangs
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Clients that are killed leave broken pipes behind."""

    def questions(self) -> list[str]:
        return [json.dumps(body, sort_keys=True) for _, body in self.seen]


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((time.monotonic(), body))
        trouble = self.server.troubles.popleft() if self.server.troubles else None
        if trouble == "hang":
            self.server.released.wait(30)
            self.close_connection = True
        elif trouble == "drop":
            self.close_connection = True
        elif trouble == "half":
            self._send(200, completion("half of it")[:40], {"content-length": "400"})
            self.close_connection = True
        elif trouble == "garbage":
            self._send(200, b"\x00\xff\x13 not json {", {})
        elif trouble == "html":
            self._send(200, b"<html>Bad gateway</html>", {"content-type": "text/html"})
        elif trouble == "no choices":
            self._send(200, b'{"choices": []}', {})
        elif trouble == "broken stream":
            self._send(200, b'data: {"choices": [{"delta": {"content": "so f"}}]}\n\n', {})
        elif trouble is not None:
            status, headers = trouble if isinstance(trouble, tuple) else (trouble, {})
            self._send(status, b'{"error": {"message": "what went wrong"}}', headers)
        else:
            time.sleep(self.server.delay)
            self._send(200, completion(answer_to(body)), {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        headers = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
