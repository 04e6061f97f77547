"""Streams that are abandoned, signal handlers, forks, and the end of the interpreter: nothing
hangs and nothing dies by a signal. Each in a process of its own, since a failure takes it down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .test_process import ENGINES, python

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks")

LOAD = """
import faulthandler, gc, os, signal, sys, threading, time, warnings
import edge_slm_runtime
from edge_slm_runtime import EdgeSlmError, Request
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork with threads
faulthandler.dump_traceback_later(90, exit=True)
def load(threads=1):
    return edge_slm_runtime.load(sys.argv[1], sys.argv[2], "int8", threads=threads)
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_the_collector_finds_an_abandoned_stream_anywhere(tiny_bundle: Path, engine: str) -> None:
    """It runs in the middle of another request, at every allocation in turn: also where the
    engine's own thread hands over a token."""
    python(
        LOAD
        + """
slm = load()
class Holder: pass
def abandon(i):
    holder = Holder()
    holder.itself, holder.stream = holder, slm.stream(f"fox {i}", max_new_tokens=3)
    next(holder.stream)
for count in range(2, 120):
    gc.collect()
    gc.disable()
    abandon(count)
    gc.set_threshold(count, 10, 10)
    gc.enable()
    slm.generate(f"boat {count}", max_new_tokens=2)
""",
        str(tiny_bundle),
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_handler_may_use_the_model(tiny_bundle: Path, engine: str) -> None:
    """Whatever it interrupts, both answers are right."""
    out = python(
        LOAD
        + """
slm = load(threads=2)
ask = lambda text: slm.generate(text, max_new_tokens=6).token_ids
expected, inner, found = ask("a cosy cabin"), ask("a red fox"), []
def interrupt(*_):
    found.append(ask("a red fox") == inner)
    signal.setitimer(signal.ITIMER_REAL, 0.0023)
signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.002)
right = True
while len(found) < 40:
    right &= ask("a cosy cabin") == expected
signal.setitimer(signal.ITIMER_REAL, 0)
print(right, all(found))
""",
        str(tiny_bundle),
        engine,
    )
    assert out.split() == ["True", "True"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_handler_may_close_the_model(tiny_bundle: Path, engine: str) -> None:
    out = python(
        LOAD
        + """
for wait in (0.001, 0.004, 0.0071, 0.012):
    slm = load(threads=2)
    def close(*_):
        time.sleep(0.08)  # longer than anything waits before it looks around
        slm.close()
    signal.signal(signal.SIGALRM, close)
    signal.setitimer(signal.ITIMER_REAL, wait)
    try:
        while True:
            slm.generate("a cosy cabin", max_new_tokens=20)
    except EdgeSlmError as error:
        print(error.code)
""",
        str(tiny_bundle),
        engine,
    )
    assert out.split() == ["engine"] * 4


def test_a_pass_keeps_the_model_that_it_uses(tiny_bundle: Path) -> None:
    """Whoever closes the model may do so while a pass is prepared."""
    out = python(
        LOAD
        + """
import weakref
slm = load()
engine = slm._engine
model = weakref.ref(engine.native.get())
prepared = engine.new_pass(engine.new_cache(1).array, 1, 1)
slm.close()
print(model() is not None)
del prepared
print(model() is None)
""",
        str(tiny_bundle),
        "onnxruntime",
    )
    assert out.split() == ["True", "True"]


def test_a_forked_child_may_load_but_not_ctranslate2(tiny_bundle: Path) -> None:
    for engine in ENGINES:
        out = python(
            LOAD
            + """
slm = load(threads=2)
expected = slm.generate("a cosy cabin", max_new_tokens=6).token_ids
sys.stdout.flush()
child = os.fork()
if not child:
    try:
        with load(threads=2) as own:
            print(own.generate("a cosy cabin", max_new_tokens=6).token_ids == expected)
    except EdgeSlmError as error:
        print(error.code, "spawn" in str(error))
    sys.stdout.flush()
    os._exit(0)  # as multiprocessing ends its children
assert os.waitpid(child, 0)[1] == 0
""",
            str(tiny_bundle),
            engine,
        )
        refused = engine == "ctranslate2"
        assert out.split() == (["used_after_fork", "True"] if refused else ["True"])


ENDS = {
    "a suspended stream": "stream = slm.stream('a', max_new_tokens=60); next(stream)",
    "a suspended batch": """
batch = slm.generate_batch([Request("a", max_new_tokens=2), Request("b")], 2)
next(batch)""",
    "a cycle": """
class Holder: pass
holder = Holder()
holder.itself, holder.slm, holder.stream = holder, slm, slm.stream("a")
next(holder.stream)
del slm""",
    "daemon threads that compute": """
def work():
    while True:
        slm.generate("a cosy", max_new_tokens=30)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)""",
    "daemon threads that stream": """
def work():
    while True:
        for _ in slm.stream("a cosy", max_new_tokens=30):
            pass
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)""",
    "a request of a finaliser": """
class Late:
    def __del__(self):
        slm.generate("a", max_new_tokens=2)
late = Late()""",
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_well(tiny_bundle: Path, engine: str, end: str) -> None:
    for _ in range(2 if "daemon" in end else 1):  # where chance has a part
        python(LOAD + f"slm = load(threads=2)\n{ENDS[end]}", str(tiny_bundle), engine)


def test_a_terminated_process_ends_by_that_signal(tiny_bundle: Path) -> None:
    code = LOAD + "slm = load(2)\nprint('ready', flush=True)\nwhile True: slm.generate('a cosy')"
    for engine in ENGINES:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tiny_bundle), engine],
            stdout=subprocess.PIPE,
            env=os.environ,
        )
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        process.stdout.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_being_read_may_be_closed_from_anywhere(tiny_bundle: Path, engine: str) -> None:
    """By another thread, and by a signal handler in the middle of the reader: it comes to its
    end long before the answer would, and nothing is raised."""
    out = python(
        LOAD
        + """
slm = load()
def read(answers, came):
    for one in answers:
        came.append(one)
def batch():
    one = Request("a cosy cabin", max_new_tokens=9, no_repeat_ngram_size=0)
    requests = (one for _ in range(10**6))
    return slm.generate_batch(requests, 2)
def stream():
    return slm.stream("a cosy cabin", max_new_tokens=90, no_repeat_ngram_size=0)
whole = len(list(stream()))
for start in (stream, batch):
    for attempt in range(20):  # on a busy machine the reader may be the first at the end
        answers, came = start(), []
        reader = threading.Thread(target=read, args=(answers, came))
        reader.start()
        while not came:
            time.sleep(0.0005)
        answers.close()
        reader.join(60)
        left = not reader.is_alive() and (start is batch or len(came) < whole)
        if left:
            break
    print(left)
    answers, came = start(), []
    signal.signal(signal.SIGALRM, lambda *_: answers.close())
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    read(answers, came)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(start is stream or len(came) < 10**6)
print(slm.generate("a red fox", max_new_tokens=3).finish_reason)
""",
        str(tiny_bundle),
        engine,
    )
    assert out.split() == ["True"] * 4 + ["max_tokens"]


def test_a_second_reader_is_refused(tiny_bundle: Path) -> None:
    """Also where it is a signal handler in the middle of the first, which goes on."""
    out = python(
        LOAD
        + """
slm, codes = load(), set()
def second(*_):
    try:
        next(stream, None)  # it may just have ended
    except EdgeSlmError as error:
        codes.add(error.code)
    signal.setitimer(signal.ITIMER_REAL, 0.0007)
signal.signal(signal.SIGALRM, second)
for _ in range(200):
    stream = slm.stream("a cosy cabin", max_new_tokens=90, no_repeat_ngram_size=0)
    signal.setitimer(signal.ITIMER_REAL, 0.0007)
    for _ in stream:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    if codes:
        break
print(*codes)
""",
        str(tiny_bundle),
        "numba",
    )
    assert out.split() == ["engine"]
