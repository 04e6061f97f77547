"""A model in a process of its own, which may end at any time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread, Timer

import pytest

import edge_slm
from edge_slm_runtime.errors import (
    BadSetting,
    BundleNotFound,
    EmptyRequest,
    EngineError,
    VariantNotFound,
    WordsOutOfRange,
)
from edge_slm_runtime.isolated import IsolatedSLM
from edge_slm_runtime.records import Generation, Request

ASKED = Request("a red fox", max_new_tokens=12, keep_length=False)
OPTIONS = {"engine": "onnxruntime", "precision": "int8", "threads": 1}


@pytest.fixture(scope="module")
def slm(tiny_bundle: Path) -> Iterator[IsolatedSLM]:
    with edge_slm.load(tiny_bundle, isolate=True, **OPTIONS) as slm:
        yield slm


def child(slm: IsolatedSLM) -> int:
    assert slm._process is not None
    return slm._process.pid


def test_it_answers_as_the_model_does(slm: IsolatedSLM, tiny_bundle: Path) -> None:
    with edge_slm.load(tiny_bundle, **OPTIONS) as here:
        wanted = here.generate(ASKED)
        assert slm.generate(ASKED).token_ids == wanted.token_ids
        assert [one.text for one in slm.generate_batch([ASKED] * 3, 2)] == [wanted.text] * 3
        told = {"max_new_tokens": 12, "keep_length": False}
        assert [one.text for one in slm.generate_batch(["a red fox"], **told)] == [wanted.text]
        several = [one.token_ids for one in here.variations(ASKED, 2, seed=3)]
        assert [one.token_ids for one in slm.variations(ASKED, 2, seed=3)] == several
        *pieces, last = slm.stream(ASKED)
        assert isinstance(last, Generation)
        assert "".join(map(str, pieces)) == last.text == wanted.text
        assert slm.manifest.digest == here.manifest.digest
        assert (slm.variant, slm.schema, slm.threads) == (here.variant, here.schema, 1)


def test_errors_are_those_of_the_model_and_end_nothing(slm: IsolatedSLM) -> None:
    before = child(slm)
    with pytest.raises(EmptyRequest) as raised:
        slm.generate("")
    assert raised.value.hint == EmptyRequest("x", raised.value.hint).hint
    with pytest.raises(WordsOutOfRange):
        slm.generate("a fox", words=10**9)
    with pytest.raises(TypeError):
        slm.generate("a fox", no_such_setting=1)
    with pytest.raises(BadSetting, match="a list"):
        next(slm.generate_batch("a fox"))
    with pytest.raises(BadSetting, match="n is 0"):
        slm.variations("a fox", 0)
    assert slm.generate(ASKED).text
    assert child(slm) == before


def test_an_abandoned_answer_is_ended_and_the_next_one_is_right(slm: IsolatedSLM) -> None:
    wanted, before = slm.generate(ASKED), child(slm)
    for _ in range(3):
        stream = slm.stream(ASKED)
        next(stream)
        with pytest.raises(EngineError, match="not complete"):
            slm.generate(ASKED)
        stream.close()  # type: ignore[attr-defined]  # a generator
        assert slm.generate(ASKED).token_ids == wanted.token_ids
    assert child(slm) == before


def test_a_crash_is_an_error_and_a_restart(slm: IsolatedSLM) -> None:
    wanted, before = slm.generate(ASKED), child(slm)
    os.kill(before, signal.SIGSTOP)  # so that the answer is not complete when it ends
    Timer(0.3, os.kill, (before, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match=r"ended by signal 9 \(the next call starts another"):
        slm.generate(ASKED)
    assert slm.generate(ASKED).token_ids == wanted.token_ids
    os.kill(child(slm), signal.SIGSEGV)  # between two calls
    time.sleep(0.2)
    assert slm.generate(ASKED).token_ids == wanted.token_ids


def test_a_process_that_says_nothing_is_killed(tiny_bundle: Path) -> None:
    with IsolatedSLM(tiny_bundle, **OPTIONS) as slm:
        slm._timeout_s = 0.5
        os.kill(child(slm), signal.SIGSTOP)
        with pytest.raises(EngineError, match="said nothing for"):
            slm.generate(ASKED)
        slm._timeout_s = 60.0
        assert slm.generate(ASKED).text


def test_callers_of_several_threads_wait_for_each_other(slm: IsolatedSLM) -> None:
    wanted, got = slm.generate(ASKED).text, []
    threads = [Thread(target=lambda: got.append(slm.generate(ASKED).text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [wanted] * 4


def test_what_cannot_be_loaded_is_said_as_by_load(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match="no bundle folder"):
        edge_slm.load(tmp_path / "none", isolate=True)
    with pytest.raises(VariantNotFound):
        edge_slm.load(tiny_bundle, isolate=True, engine="ctranslate2", precision="int4")
    slm = IsolatedSLM(tiny_bundle, **OPTIONS)
    slm.close()
    with pytest.raises(EngineError, match="the model is closed"):
        slm.generate(ASKED)
