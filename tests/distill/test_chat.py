"""The chat client against a real server that behaves badly in every known way."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from edge_slm.distill import chat
from edge_slm.distill.chat import Chat, ChatRequest
from edge_slm.journal import Journal
from edge_slm_runtime.errors import BadSetting, DataError, TeacherError

from .chat_server import ChatServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(chat, "_FIRST_PAUSE", 0.02)
    with ChatServer() as running:
        yield running


def prompts(count: int) -> list[ChatRequest]:
    return [ChatRequest((("user", f"question {i}"),), 0.5, 20, i) for i in range(count)]


def test_replies_come_in_order_and_are_never_asked_again(
    server: ChatServer, tmp_path: Path
) -> None:
    journal = tmp_path / "deep" / "answers.jsonl"
    steps: list[tuple[int, int]] = []
    first = list(
        Chat(server.url, "m", journal=journal).ask(prompts(40), lambda d, t: steps.append((d, t)))
    )
    assert [reply.prompt for reply in first] == prompts(40)
    assert len({reply.text for reply in first}) > 30
    assert steps == [(i, 40) for i in range(1, 41)]
    assert len(server.seen) == 40
    again = list(Chat(server.url, "m", journal=journal).ask(prompts(41)))
    assert again[:40] == first
    assert len(server.seen) == 41
    body = server.seen[0][1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 20)
    row = json.loads(journal.read_text("utf-8").splitlines()[0])
    assert row["raw"]["choices"][0]["message"]["content"] == row["text"]


def test_equal_prompts_are_asked_once(server: ChatServer) -> None:
    same = prompts(1) * 20
    assert len({reply.text for reply in Chat(server.url, "m").ask(same)}) == 1
    assert len(server.seen) == 1


def test_everything_that_decides_the_answer_is_in_the_key() -> None:
    base = ChatRequest((("user", "a"),), 0.5, 20, 1)
    others = [
        ChatRequest((("user", "b"),), 0.5, 20, 1),
        ChatRequest((("assistant", "a"),), 0.5, 20, 1),
        ChatRequest((("user", "a"),), 0.6, 20, 1),
        ChatRequest((("user", "a"),), 0.5, 21, 1),
        ChatRequest((("user", "a"),), 0.5, 20, 2),
    ]
    assert len({prompt.key("m") for prompt in [base, *others]} | {base.key("n")}) == 7


@pytest.mark.parametrize(
    "trouble",
    ["garbage", "html", "no choices", "half", "drop", "hang", "broken stream", 500, 503, 408, 429],
)
def test_what_may_pass_is_tried_again(server: ChatServer, trouble: object) -> None:
    quiet = [r.text for r in Chat(server.url, "m").ask(prompts(6))]
    server.troubles.extend([trouble] * 3)
    replies = Chat(server.url, "m", timeout=0.5).ask(prompts(6))
    assert [reply.text for reply in replies] == quiet
    assert len(server.seen) == 6 + 9


def test_a_server_that_fails_twice_then_answers(server: ChatServer) -> None:
    server.troubles.extend([500, 500])
    (reply,) = Chat(server.url, "m", retries=2).ask(prompts(1))
    assert reply.text
    assert len(server.seen) == 3


def test_retry_after_holds_everyone(server: ChatServer) -> None:
    server.troubles.append((429, {"Retry-After": "1"}))
    list(Chat(server.url, "m", concurrency=1).ask(prompts(3)))
    times = [when for when, _ in server.seen]
    assert len(times) == 4
    assert times[1] - times[0] >= 0.99


def test_retry_after_is_seconds_or_a_date() -> None:
    assert chat._retry_after({"retry-after": "2.5"}) == 2.5
    assert 25 < chat._retry_after({"retry-after": formatdate(time.time() + 30)}) <= 30
    assert chat._retry_after({"retry-after": "soon"}) == 0
    assert chat._retry_after({}) == 0


def test_a_server_that_asks_for_an_hour_is_given_up(server: ChatServer) -> None:
    server.troubles.append((429, {"Retry-After": "3600"}))
    with pytest.raises(TeacherError, match="asks to wait 3600 s"):
        list(Chat(server.url, "m").ask(prompts(1)))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_will_not_pass_stops_at_once(server: ChatServer, status: int) -> None:
    server.troubles.extend([status] * 50)
    with pytest.raises(TeacherError) as caught:
        list(Chat(server.url, "no-such-model", concurrency=2).ask(prompts(50)))
    line = str(caught.value)
    assert server.url in line
    assert "no-such-model" in line
    assert str(status) in line
    assert "\n" not in line
    assert (caught.value.code, caught.value.exit_code) == ("teacher_failed", 10)
    assert len(server.seen) < 20


def test_what_was_answered_before_a_failure_is_kept(server: ChatServer, tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    client = Chat(server.url, "m", journal=journal, concurrency=1, retries=2)
    replies = client.ask(prompts(10))
    for _ in range(4):
        next(replies)
        server.troubles.clear()
    server.troubles.extend([500] * 100)
    with pytest.raises(TeacherError, match=r"failed 3 times in a row, last: 500.*start again"):
        list(replies)
    kept = len(journal.read_text("utf-8").splitlines())
    assert kept >= 4
    server.troubles.clear()
    asked = len(server.seen)
    assert len(list(client.ask(prompts(10)))) == 10
    assert len(server.seen) - asked == 10 - kept


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(TeacherError, match=f"{url} failed 2 times in a row, last: no conn"):
            list(Chat(url, "m", retries=1).ask(prompts(1)))


def test_a_torn_journal_loses_its_last_line_only(server: ChatServer, tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    list(Chat(server.url, "m", journal=journal).ask(prompts(5)))
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-10])
    list(Chat(server.url, "m", journal=journal).ask(prompts(5)))
    assert len(server.seen) == 6
    rows = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 5


def test_a_journal_has_one_writer(server: ChatServer, tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    with Journal(journal), pytest.raises(DataError, match="another process is writing"):
        list(Chat(server.url, "m", journal=journal).ask(prompts(1)))
    journal.write_text('{"some": "other file"}\n', "utf-8")
    with pytest.raises(DataError, match="no journal of answers"):
        list(Chat(server.url, "m", journal=journal).ask(prompts(1)))


def test_the_rate_limit_holds(server: ChatServer) -> None:
    started = time.perf_counter()
    list(Chat(server.url, "m", requests_per_minute=1200).ask(prompts(8)))
    assert time.perf_counter() - started >= 7 * 0.05
    assert len(server.seen) == 8


def test_an_endless_source_is_read_a_little_ahead(server: ChatServer) -> None:
    taken = itertools.count()
    endless = (ChatRequest((("user", f"{next(taken)}"),)) for _ in itertools.repeat(0))
    replies = Chat(server.url, "m", concurrency=2).ask(endless)
    for _ in range(3):
        next(replies)
    replies.close()
    assert next(taken) <= 12


def test_an_event_stream_is_read() -> None:
    parts = [{"role": "assistant"}, {"content": "a red "}, {"content": "fox"}]
    chunks = [{"choices": [{"delta": part}]} for part in parts]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "length"}]}, {"choices": []}]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    text, cut, raw = chat._read(body.encode())
    assert (text, cut) == ("a red fox", True)
    assert raw == chunks


def test_thinking_without_an_answer_is_an_empty_text() -> None:
    body = {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
    assert chat._read(json.dumps(body).encode())[:2] == ("", True)


@pytest.mark.parametrize("address", ["localhost:8000", "http://", "http://a:b/v1", "ftp://a", ""])
def test_an_address_must_be_one(address: str) -> None:
    with pytest.raises(BadSetting, match="not the address of a server"):
        Chat(address, "m")


def test_ctrl_c_stops_at_once(server: ChatServer) -> None:
    server.troubles.extend(["hang"] * 50)
    code = (
        "import sys; from edge_slm.distill.chat import Chat, ChatRequest\n"
        "list(Chat(sys.argv[1], 'm').ask(ChatRequest((('user', str(i)),)) for i in range(50)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url], stderr=subprocess.PIPE, text=True
    )
    while len(server.seen) < 8:
        assert process.poll() is None
        time.sleep(0.02)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - start < 5
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Task" not in errors
