"""The server as a process of its own, called by the `openai` client and by hand."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

import edge_slm
from edge_slm_runtime import SLM

from .test_commands import EDGE_SLM, error_of, run

KEY = "a-key"
NAME = "edge-slm-reference"
ASKED: dict[str, Any] = {"task": "image", "words": 12}
SHIPPED = str(edge_slm.shipped_bundle())
LONG = {"request": "a red fox", "task": "image", "words": 150, "no_repeat_ngram_size": 0}


class Server:
    """`edge-slm serve` on a free port."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*EDGE_SLM, "serve", SHIPPED, "--port", "0", "--threads", "1", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EDGE_SLM_API_KEY": KEY},
        )
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        self.address = urlsplit(self.url).netloc

    def call(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"authorization": f"Bearer {KEY}"}
        if content is not None:
            given["content-type"] = "application/json"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, given | named)
        response = connection.getresponse()
        answer = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return answer

    def error(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        status, _, content = self.call(method, path, body, **headers)
        error = json.loads(content)["error"]
        assert error["message"]
        assert error["type"].endswith("error")
        return status, error["code"]

    def metric(self, line: str) -> float:
        page = self.call("GET", "/metrics")[2].decode()
        found = [float(one.split()[-1]) for one in page.splitlines() if one.startswith(line)]
        return sum(found)

    def left_open(self, path: str, body: object) -> socket.socket:
        """A connection on which that has been asked."""
        host, _, port = self.address.partition(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content)
        return connection

    def wait_for(self, line: str, value: float) -> None:
        latest = time.monotonic() + 60
        while self.metric(line) != value:
            assert time.monotonic() < latest
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--rows", "2", "--waiting", "8", "--cors", "https://app.example")
    yield server
    server.process.terminate()
    _, err = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def slm() -> Iterator[SLM]:
    with edge_slm.load(threads=1) as slm:
        yield slm


def test_completions(client: openai.OpenAI, slm: SLM) -> None:
    expected = slm.generate("a red fox", **ASKED)
    asked: dict[str, Any] = {"model": NAME, "prompt": "a red fox", "extra_body": ASKED}
    whole = client.completions.create(**asked)
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason) == (expected.text, "stop")
    ours = choice.model_extra["edge_slm"]
    assert (ours["words"], ours["in_tolerance"]) == (expected.words, True)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == expected.stats.new_tokens
    events = list(client.completions.create(**asked, stream=True))
    assert "".join(event.choices[0].text for event in events) == expected.text
    assert [event.choices[0].finish_reason for event in events[-2:]] == [None, "stop"]
    two = client.completions.create(model=NAME, prompt=["a", "b"], max_tokens=4, n=2)
    assert [one.index for one in two.choices] == [0, 1, 2, 3]
    assert {one.finish_reason for one in two.choices} == {"length"}


def test_chat(client: openai.OpenAI, slm: SLM) -> None:
    """With the command as metadata, whose values are texts."""
    expected = slm.generate("a red fox", **ASKED)
    asked: dict[str, Any] = {
        "model": NAME,
        "messages": [
            {"role": "system", "content": "You write prompts."},
            {"role": "user", "content": [{"type": "text", "text": "a red fox"}]},
        ],
        "metadata": {"task": "image", "words": "12"},
    }
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected.text
    ours = whole.choices[0].model_extra["edge_slm"]
    assert "1 earlier messages were not read" in ours["warnings"][0]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = client.chat.completions.create(**asked, **options)
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == expected.text
    assert last.usage.prompt_tokens == expected.stats.prompt_tokens


def test_models(client: openai.OpenAI, slm: SLM) -> None:
    (model,) = client.models.list()
    assert model.id == NAME == client.models.retrieve(NAME).id
    assert set(model.model_extra["tasks"]) == set(slm.schema.tasks)


def test_prompts(server: Server, slm: SLM) -> None:
    asked = {"request": "a red fox", **ASKED, "temperature": 0.9, "seed": 5, "n": 3}
    expected = [
        slm.generate("a red fox", **ASKED, temperature=0.9, seed=seed).text for seed in (5, 6, 7)
    ]
    body = json.loads(server.call("POST", "/v1/prompts", asked)[2])
    assert [one["text"] for one in body["prompts"]] == expected
    _, headers, content = server.call("POST", "/v1/prompts", {**asked, "stream": True})
    assert headers["content-type"].startswith("text/event-stream")
    *events, done = [line[6:] for line in content.decode().split("\n\n") if line]
    texts = ["", "", ""]
    for event in map(json.loads, events):
        texts[event["index"]] += event.get("text", "")
    assert (texts, done) == (expected, "[DONE]")


def test_the_best_of_several(server: Server, client: openai.OpenAI, slm: SLM) -> None:
    asked = {**ASKED, "temperature": 0.9, "seed": 5}
    ranked = slm.variations("a red fox", n=4, **asked)
    body = json.loads(
        server.call("POST", "/v1/prompts", {"request": "a red fox", **asked, "best_of": 4})[2]
    )
    assert [one["text"] for one in body["prompts"]] == [ranked[0].text]
    two = client.completions.create(
        model=NAME, prompt=["a red fox", "a dog"], n=2, best_of=4, extra_body=asked
    )
    assert [one.text for one in two.choices[:2]] == [one.text for one in ranked[:2]]
    assert len(two.choices) == 4


def test_a_deadline(server: Server) -> None:
    body = json.loads(server.call("POST", "/v1/prompts", {**LONG, "deadline_ms": 1e-3})[2])
    assert body["prompts"][0]["finish_reason"] == "deadline"


def test_what_is_wrong_is_told_in_openais_shape(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="poem") as caught:
        client.completions.create(model=NAME, prompt="a", extra_body={"task": "poem"})
    assert caught.value.code == "unknown_task"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.RateLimitError) as busy:
        client.completions.create(model=NAME, prompt="a", n=16, extra_body={"task": "image"})
    assert busy.value.code == "session_full"
    assert busy.value.response.headers["retry-after"] == "1"
    server.wait_for("edge_slm_running", 0)
    assert client.completions.create(model=NAME, prompt="a", max_tokens=1).choices


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "request_not_text"),
        (b"[1]", "request_not_text"),
        (b'{"request": ' + b"[" * 100000, "request_not_text"),
        ({}, "empty_request"),
        ({"request": 3}, "request_not_text"),
        ({"request": "\ud800"}, "request_not_text"),
        ({"request": "a", "temprature": 1}, "bad_setting"),
        ({"request": "a", "tools": [{}]}, "bad_setting"),
        ({"request": "a", "n": 17}, "bad_setting"),
        ({"request": "a", "n": 10**400}, "bad_setting"),
        ({"request": "a", "n": 3, "best_of": 2}, "bad_setting"),
        ({"request": "a", "best_of": 17}, "bad_setting"),
        ({"request": "a", "best_of": 2, "stream": True}, "bad_setting"),
        ({"request": "a", "best_of": 2, "seed": "x"}, "bad_setting"),
        ({"request": "a", "stream": "yes"}, "bad_setting"),
        ({"request": "a", "temperature": float("nan")}, "bad_setting"),
        ({"request": "a", "metadata": {"words": "many"}}, "bad_setting"),
        ({"request": "word " * 1000}, "request_too_long"),
    ],
)
def test_bad_bodies(server: Server, body: object, code: str) -> None:
    assert server.error("POST", "/v1/prompts", body) == (400, code)


def test_who_is_let_in(server: Server) -> None:
    asked = {"request": "a", "max_new_tokens": 2, "tools": None, "logit_bias": {}}
    assert server.call("POST", "/v1/prompts", asked)[0] == 200
    for path in ("/v1/models", "/metrics"):
        assert server.error("GET", path, authorization="Bearer x") == (401, "invalid_api_key")
    for path in ("/", "/health"):
        assert server.call("GET", path, authorization="")[0] == 200
    simple = server.error("POST", "/v1/prompts", asked, content_type="text/plain")
    assert simple == (415, "not_json")
    assert server.error("GET", "/health", host="evil.example") == (403, "host_refused")
    assert server.error("GET", "/nothing") == (404, "not_found")
    assert server.error("GET", "/v1/prompts") == (405, "method_not_allowed")
    assert server.error("POST", "/v1/prompts", b" " * (1 << 20) + b"{}") == (413, "body_too_long")
    for origin, allowed in (("https://app.example", True), ("https://other.example", False)):
        headers = server.call("GET", "/health", origin=origin)[1]
        assert ("access-control-allow-origin" in headers) == allowed


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_work(server: Server, stream: bool) -> None:
    counted = 'edge_slm_answers_total{finish_reason="cancelled"}'
    before = server.metric(counted)
    connection = server.left_open("/v1/prompts", {**LONG, "stream": stream})
    if stream:
        assert connection.recv(64)
    else:
        server.wait_for("edge_slm_running", 1)
    connection.close()
    server.wait_for(counted, before + 1)
    server.wait_for("edge_slm_running", 0)


def test_many_clients(server: Server, slm: SLM) -> None:
    """Those who are told to come again do so; nothing is lost."""
    texts = [f"a red fox and {i} boats" for i in range(12)]
    expected = [one.text for one in slm.generate_batch(texts, **ASKED)]
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=60) as client:
            answer = client.completions.create(
                model=NAME, prompt=texts[index], extra_body=ASKED, user=str(index)
            )
            found[index] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[i] for i in range(len(texts))] == expected


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_told_to_end_it_completes_what_is_under_way() -> None:
    server = Server()
    connection = server.left_open("/v1/prompts", LONG)
    server.wait_for("edge_slm_running", 1)
    server.process.send_signal(signal.SIGTERM)
    with connection, connection.makefile("rb") as answer:
        assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
        assert b'"finish_reason": "cancelled"' not in answer.read()
    _, err = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, err


def test_an_address_that_is_taken_and_an_extra_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert f"127.0.0.1:{port}" in error_of(run("serve", "--port", port), "os", 1)
    for name in [name for name in sys.modules if name.startswith("edge_slm.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    hint = error_of(run("serve"), "dependency_missing", 5)
    assert "pip install 'edge-slm[serve]'" in hint
