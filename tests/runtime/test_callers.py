"""What callers may give, and what a model says of itself."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_slm_runtime import SLM, Request, load
from edge_slm_runtime.errors import BadSetting, BoundToProcess, UnknownTask
from edge_slm_runtime.isolated import IsolatedSLM

REQUEST = "a cosy cabin in the snow"


@pytest.fixture(scope="module")
def plain_slm(tiny_bundle: Path) -> Iterator[SLM]:
    with load(tiny_bundle, "onnxruntime", threads=np.int64(1)) as loaded:  # type: ignore[arg-type]
        yield loaded


def test_texts_in_a_batch_are_requests(plain_slm: SLM) -> None:
    alone = [plain_slm.generate(text, words=3).text for text in (REQUEST, "a fox")]
    batch = plain_slm.generate_batch([REQUEST, Request("a fox")], np.int64(2), words=3)  # type: ignore[arg-type]
    assert [result.text for result in batch] == alone
    with pytest.raises(BadSetting, match="a list"):
        plain_slm.generate_batch(REQUEST)


def test_a_bad_request_of_a_batch_is_named(plain_slm: SLM) -> None:
    with pytest.raises(UnknownTask, match=r"^request 1 of the batch: unknown task 'poem' \(known"):
        list(plain_slm.generate_batch(["a", Request("b", task="poem")]))
    with pytest.raises(UnknownTask, match=r"^unknown task"):
        plain_slm.generate("a", task="poem")


def test_a_seed_without_a_temperature_warns(plain_slm: SLM) -> None:
    assert "seed has no effect" in plain_slm.generate(REQUEST, seed=1, words=3).warnings[0]
    assert not plain_slm.generate(REQUEST, seed=1, temperature=1, words=3).warnings


def test_a_model_describes_itself(plain_slm: SLM) -> None:
    assert repr(plain_slm) == "<SLM 'tiny': onnx-int8 on 1 threads>"
    lines = dict(line.split(maxsplit=1) for line in plain_slm.describe().splitlines())
    assert lines["tasks"] == "image, video, title"
    assert lines["words"] == "1 … 160"
    assert lines["loaded"] == "onnx-int8 (onnxruntime, int8) on 1 threads"


def send(thing: object) -> None:
    multiprocessing.get_context("spawn").Process(target=print, args=(thing,)).start()


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy, send])
def test_a_loaded_model_can_be_neither_copied_nor_sent(
    way: Callable[[Any], object], plain_slm: SLM
) -> None:
    with plain_slm.session() as session:
        for thing in (
            *(plain_slm, session, session.submit(REQUEST, words=2), plain_slm.stream(REQUEST)),
            plain_slm.generate_batch([REQUEST]),
            IsolatedSLM.__new__(IsolatedSLM),
        ):
            told = f"a {type(thing).__name__} can .*load the model in the process"
            with pytest.raises(BoundToProcess, match=told):
                way(thing)


def test_requests_answers_and_errors_can_be_sent(plain_slm: SLM) -> None:
    request = Request(REQUEST, words=3)
    assert pickle.loads(pickle.dumps(request)) == request
    answer = plain_slm.generate(request)
    assert copy.deepcopy(answer) == pickle.loads(pickle.dumps(answer)) == answer
    error = UnknownTask("unknown task", "choose another")
    sent = pickle.loads(pickle.dumps(error))
    assert (str(sent), sent.problem, sent.hint) == (str(error), error.problem, error.hint)
