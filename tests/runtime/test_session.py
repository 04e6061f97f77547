"""Callers of several threads and coroutines share a model: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from pathlib import Path

import pytest

from edge_slm_runtime import SLM, Generation, Request, Session, SessionStream, load
from edge_slm_runtime.answer import Answer, Step
from edge_slm_runtime.engines.stepping import SteppingEngine
from edge_slm_runtime.errors import (
    BadSetting,
    EngineError,
    OutOfMemory,
    RequestTooLong,
    SessionFull,
    UnknownTask,
)

from .conftest import VARIANTS
from .test_process import ENGINES, python

TEXT = "a cosy cabin in the snow"
REQUESTS = [
    Request(
        (TEXT, "neon street in the rain, reflections", "misty forest")[i % 3],
        words=(None, 3, 8)[i % 3],
        temperature=1.2 * (i % 2),
        seed=i if i % 2 else None,
        max_new_tokens=6 + 4 * (i % 5),
    )
    for i in range(15)
]
LONG = Request(TEXT, max_new_tokens=100, no_repeat_ngram_size=0)


def told(answer: Generation) -> tuple[object, ...]:
    return answer.text, answer.token_ids, answer.finish_reason, answer.seed


@pytest.fixture(
    scope="module", params=[v for v in VARIANTS if v != ("onnxruntime", "int4")], ids="-".join
)
def model(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[SLM]:
    """Those whose rows get the same bits alone and beside others."""
    with load(tiny_bundle, *request.param, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def quick(tiny_bundle: Path) -> Iterator[SLM]:
    with load(tiny_bundle, "numba", "int8", threads=1) as loaded:
        yield loaded


Hold = Callable[[int], threading.Semaphore]


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Hold:
    """From the call on, answers to LONG get as many tokens as the semaphore lets through."""

    def start(count: int) -> threading.Semaphore:
        accept, tokens = Answer.accept, threading.Semaphore(count)

        def held(answer: Answer, token: int) -> Step:
            while answer.plan.budget == LONG.max_new_tokens and not answer.cancelled:
                if tokens.acquire(timeout=0.01):
                    break
            return accept(answer, token)

        monkeypatch.setattr(Answer, "accept", held)
        return tokens

    return start


def asked(slm: SLM) -> list[Request]:
    return [one for one in REQUESTS if slm.seeds or not one.temperature]


def test_submitted_answers_are_those_of_generate(model: SLM) -> None:
    """Of requests that come from several threads while others are under way."""
    alone = [told(model.generate(one)) for one in asked(model)]
    found: list[list[tuple[object, ...]]] = []
    with model.session(rows=3) as session:

        def ask() -> None:
            streams = [session.submit(one) for one in asked(model)]
            pieces = ["".join(stream) for stream in streams]
            assert pieces == [stream.result.text for stream in streams]
            found.append([told(stream.result) for stream in streams])

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == [alone] * 3


def test_cancels_at_any_moment_under_load(model: SLM) -> None:
    """No answer hangs, no row is lost, and those that nobody cancels are what they are alone."""
    many = 200 if isinstance(model._engine, SteppingEngine) else 40
    whole = [told(model.generate(one)) for one in asked(model)]
    with model.session(rows=4, waiting=2 * many) as session:
        chance = random.Random(3)
        left: list[tuple[int, SessionStream]] = []
        cancelled: list[tuple[int, SessionStream]] = []
        for number in range(2 * many):
            index = number % len(whole)
            (cancelled if number % 2 else left).append((index, session.submit(asked(model)[index])))
        for _, stream in chance.sample(cancelled, many):
            time.sleep(chance.choice((0, 0, 0.0004, 0.001)))
            stream.cancel()
        for index, stream in left:
            assert told(stream.result) == whole[index]
        for index, stream in cancelled:
            result = stream.result
            assert "".join(stream) == result.text
            if result.finish_reason == "cancelled":
                assert str(whole[index][0]).startswith(result.text)
            else:
                assert told(result) == whole[index]
        assert (session.running, session.waiting) == (0, 0)
        assert told(session.submit(asked(model)[0]).result) == whole[0]


def test_a_cancelled_answer_keeps_what_it_has(model: SLM, hold: Hold) -> None:
    whole = model.generate(LONG)
    with model.session(rows=2) as session:
        hold(5)
        stream = session.submit(LONG)
        first = next(stream)
        stream.cancel()
        result = stream.result
        assert result.stats.new_tokens <= 6
        assert first + "".join(stream) == result.text
        assert whole.text.startswith(result.text)
        assert result.token_ids == whole.token_ids[: result.stats.new_tokens]
        assert 0 < result.stats.ttft_ms <= result.stats.total_ms
        assert result.finish_reason == "cancelled"
        stream.cancel()
        assert stream.result is result


def test_a_deadline_ends_an_answer(model: SLM, hold: Hold) -> None:
    """After its first pass, and while it waits for others."""
    whole = model.generate(LONG)
    for ended in (model.generate(LONG, deadline_ms=1e-3), read(model, LONG, deadline_ms=1e-3)):
        assert ended.finish_reason == "deadline"
        assert ended.stats.new_tokens <= 1
    assert told(model.generate(LONG, deadline_ms=1e6)) == told(whole)
    *_, late = model.generate_batch([LONG, Request(TEXT, words=5, deadline_ms=1e-3)])
    assert (late.finish_reason, late.in_tolerance) == ("deadline", False)
    with model.session(rows=1) as session:
        tokens = hold(5)
        first = session.submit(LONG)
        next(first)
        second = session.submit(LONG, deadline_ms=1e-3)
        tokens.release(2)
        assert second.result.finish_reason == "deadline"
        assert second.result.stats.new_tokens == 0
        assert not first.done
        tokens.release(200)
        assert told(first.result) == told(whole)


def test_what_fits_a_deadline(model: SLM) -> None:
    none, whole = (model.plan(TEXT, task="image", deadline_ms=limit) for limit in (1e-3, 1e6))
    assert (none.words, none.tokens) == (None, 0)
    room = model.manifest.model.positions - len(model.check(Request(TEXT)).prompt)
    assert whole.tokens == room
    assert whole.words is not None
    model.check(Request(TEXT, task="image", words=whole.words))  # the most that can be asked
    with pytest.raises(RequestTooLong):
        model.check(Request(TEXT, task="image", words=whole.words + 1))
    assert whole.ttft_ms > 0 < whole.tpot_ms
    with pytest.raises(BadSetting, match="deadline_ms is missing"):
        model.plan(TEXT)


def read(slm: SLM, request: Request, **settings: float) -> Generation:
    stream = slm.stream(request, **settings)
    assert "".join(stream) == stream.result.text
    return stream.result


@pytest.mark.parametrize("deadline", [0, -1, True, float("nan"), float("inf"), "7", 10**500])
def test_a_deadline_is_a_number(quick: SLM, deadline: object) -> None:
    with pytest.raises(BadSetting, match="deadline_ms"):
        quick.check(Request(TEXT, deadline_ms=deadline))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["numba", "onnxruntime"])
def test_a_long_prompt_holds_nobody_up_and_can_be_called_off(
    tiny_bundle: Path, engine: str
) -> None:
    prompt = "neon street in the rain, reflections " * 4
    with load(tiny_bundle, engine, "int8", threads=1, prefill_tokens=8) as slm:
        short, long = (slm._answer(Request(text, max_new_tokens=30)) for text in (TEXT, prompt))
        waiting = iter([short, long])
        steps = slm._engine.decode(waiting, 2)
        between: list[Answer] = []
        while not long.ids:
            between.append(next(steps).answer)
        parts = [i for i, answer in enumerate(between) if answer is long]
        assert len(parts) > 5
        assert all(short in between[a:b] for a, b in pairwise(parts))
        expected = [slm.generate(one.plan.request, max_new_tokens=30) for one in (short, long)]
        for _ in steps:
            pass
        assert [short.text, long.text] == [one.text for one in expected]

        slm.trim_memory()
        called_off = slm._answer(Request(prompt))
        steps = slm._engine.decode([called_off], 2)
        assert next(steps) == Step(called_off, "", done=False)
        called_off.cancelled = True
        assert [step.done for step in steps] == [True]
        assert (called_off.finish, called_off.ids) == ("cancelled", [])
        stream = slm.stream(prompt)
        threading.Timer(0, stream.cancel).start()
        assert "".join(stream) == stream.result.text


def test_coroutines(quick: SLM, hold: Hold) -> None:
    alone = [told(quick.generate(one)) for one in REQUESTS]

    async def ask(session: Session, request: Request) -> Generation:
        stream = session.submit(request)
        text = "".join([piece async for piece in stream])
        result = await stream
        assert text == result.text
        return result

    async def main() -> None:
        with quick.session(rows=3) as session:
            hold(5)
            given_up = session.submit(LONG)
            task = asyncio.ensure_future(awaited(given_up))
            answers = asyncio.gather(*(ask(session, one) for one in REQUESTS))
            await asyncio.sleep(0)  # both begin
            await anext(given_up)
            task.cancel()
            assert [told(one) for one in await answers] == alone
            assert (await given_up).finish_reason == "cancelled"
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


async def awaited(stream: SessionStream) -> Generation:
    return await stream


def test_many_wait_for_one_answer(quick: SLM) -> None:
    with quick.session() as session, session.submit(LONG) as stream:
        found: list[str] = []
        readers = [
            threading.Thread(target=lambda: found.append(stream.result.text)) for _ in range(4)
        ]
        for reader in readers:
            reader.start()
        text = "".join(stream)
        for reader in readers:
            reader.join(60)
    assert found == [text] * 4
    assert stream.result.finish_reason != "cancelled"


def test_a_session_takes_so_many_and_first_come_first_served(quick: SLM, hold: Hold) -> None:
    with quick.session(rows=1, waiting=3) as session:
        tokens = hold(5)
        streams = [session.submit(LONG)]
        next(streams[0])
        streams += [session.submit(Request(f"fox {i}", max_new_tokens=3)) for i in range(3)]
        assert (session.running, session.waiting) == (1, 3)
        with pytest.raises(SessionFull, match="3 requests are waiting"):
            session.submit("one more")
        streams[2].cancel()
        assert streams[2].result.stats.new_tokens == 0
        session.submit("one more").cancel()
        tokens.release(200)
        assert streams[3].result.finish_reason == "max_tokens"
        assert streams[1].done
    for setting in ({"rows": 0}, {"rows": True}, {"waiting": 0}):
        with pytest.raises(BadSetting):
            quick.session(**setting)


def test_rows_are_bounded_by_memory(tiny_bundle: Path) -> None:
    with load(tiny_bundle, "numba", "int8", threads=1, max_memory_mb=70) as slm:
        assert slm._most_rows is not None
        with pytest.raises(OutOfMemory, match="a rows of"):
            slm.session(rows=slm._most_rows + 1)


def test_closing(quick: SLM, hold: Hold) -> None:
    with quick.session(rows=2) as session:
        with pytest.raises(UnknownTask):
            session.submit(TEXT, task="poem")
        streams = [session.submit(one) for one in REQUESTS]
    assert all(stream.done for stream in streams)
    assert {stream.result.finish_reason for stream in streams}.isdisjoint({"cancelled"})
    with pytest.raises(EngineError, match="the session is closed"):
        session.submit(TEXT)
    session.close()
    streams = []
    hold(5)

    def fail() -> None:
        with quick.session(rows=2) as session:
            streams.extend(session.submit(LONG) for _ in range(5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {stream.result.finish_reason for stream in streams} == {"cancelled"}


def test_callers_of_other_keys_share_no_rows(quick: SLM) -> None:
    with quick.session(rows=2) as session:
        keys = cycle("ab")
        answers = [session.submit(TEXT, max_new_tokens=4, cache_key=next(keys)) for _ in range(2)]
        assert [answer.result.stats.cached_tokens for answer in answers] == [0, 0]
        again = session.submit(TEXT, max_new_tokens=4, cache_key="c").result
        assert again.stats.cached_tokens == 0


def test_a_model_that_fails_fails_its_answers_and_nothing_hangs(
    tiny_bundle: Path, hold: Hold
) -> None:
    slm = load(tiny_bundle, "numba", "int8", threads=1)
    with slm.session(rows=2) as session:
        tokens = hold(5)
        streams = [session.submit(LONG) for _ in range(5)]
        next(streams[0])
        slm.close()
        tokens.release(500)
        for stream in streams:
            with pytest.raises(EngineError, match="closed"):
                _ = stream.result
            with pytest.raises(EngineError, match="closed"):
                list(stream)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_session_in_signal_handlers_and_at_exit(tiny_bundle: Path, engine: str) -> None:
    """Handlers submit and cancel whatever they interrupt; the interpreter ends with answers
    under way."""
    out = python(
        """
import faulthandler, signal, sys
import edge_slm_runtime
faulthandler.dump_traceback_later(90, exit=True)
slm = edge_slm_runtime.load(sys.argv[1], sys.argv[2], "int8", threads=1)
session = slm.session(rows=2, waiting=1000)
ask = lambda: session.submit("a cosy cabin", max_new_tokens=6)
expected, left, count = ask().result.token_ids, [], 0
def interrupt(*_):
    global count
    count += 1
    ask().cancel()
    left.append(ask())
    signal.setitimer(signal.ITIMER_REAL, 0.0013)
signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.001)
right = True
while count < 40:
    stream = ask()
    list(stream)
    right &= stream.result.token_ids == expected
signal.setitimer(signal.ITIMER_REAL, 0)
print(right, {one.result.token_ids for one in left} == {expected})
ask()
next(session.submit("a cosy cabin"))
""",
        str(tiny_bundle),
        engine,
    )
    assert out.split() == ["True", "True"]
