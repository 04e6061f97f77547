"""The numba engine's threads: the same bits however many, woken, shared, ended."""

from __future__ import annotations

import _thread
import gc
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_slm_runtime import loading, read_manifest
from edge_slm_runtime.engines.base import EngineOptions
from edge_slm_runtime.engines.numba_engine import NumbaEngine
from edge_slm_runtime.engines.pace import Pace
from edge_slm_runtime.errors import EngineError
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.panels import LANES

from .test_process import python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120, method="thread"),  # a thread that hangs does so outside Python
]

IDS = np.random.default_rng(8).integers(60, 400, 60).tolist()
CUTS = ([60], [1] * 60, [7, 20, 1, 32], [59, 1])
Logits = NDArray[np.float32]


def opened(bundle: Path, precision: str = "int8", threads: int = 1) -> NumbaEngine:
    facts = read_manifest(bundle).model
    return NumbaEngine(bundle / f"numba-{precision}", facts, EngineOptions(threads=threads))


def logits(engine: NumbaEngine, cuts: Sequence[int], ids: Sequence[int] = IDS) -> Logits:
    """Behind every token, computed in pieces of these lengths [S,V]."""
    cache, start, found = engine.new_cache(1).array, 0, []
    for width in cuts:
        step = engine.new_pass(cache, width, width)
        found.append(step.run([ids[start : start + width]], [start])[0].copy())
        start += width
    return np.concatenate(found)


@pytest.fixture(params=["int8", "int4"])
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def engine(tiny_bundle: Path) -> Iterator[NumbaEngine]:
    found = opened(tiny_bundle, threads=3)
    yield found
    found.close()


def test_the_same_bits_with_any_threads_and_in_any_pieces(
    tiny_bundle: Path, precision: str
) -> None:
    alone = opened(tiny_bundle, precision)
    expected = logits(alone, CUTS[0])
    assert np.isfinite(expected).all()
    for threads in (1, 2, 3, 5, 16):  # more than there are cores
        engine = opened(tiny_bundle, precision, threads)
        for cuts in CUTS:
            np.testing.assert_array_equal(logits(engine, cuts), expected)
        engine.close()


def test_the_same_bits_in_company(tiny_bundle: Path, precision: str) -> None:
    """Rows at places of their own, and the last logits only."""
    engine = opened(tiny_bundle, precision, 2)
    expected = logits(engine, CUTS[0])
    for rows in range(1, 11):
        cache, starts = engine.new_cache(rows + 1).array, [3 * row for row in range(rows)]
        for row, start in enumerate(starts):
            if start:
                before = engine.new_pass(cache[:, row : row + 1], start, 1)
                before.run([IDS[:start]], [0])
        step = engine.new_pass(cache[:, :rows], 5, 2)
        found = step.run([IDS[start : start + 5] for start in starts], starts)
        for row, start in enumerate(starts):
            np.testing.assert_array_equal(found[row], expected[start + 3 : start + 5])
    engine.close()


def test_the_same_bits_beside_prompts_of_other_lengths(tiny_bundle: Path, precision: str) -> None:
    """Several prompts in one pass, some of them begun before."""
    engine = opened(tiny_bundle, precision, 3)
    prompts = [IDS[i : i + n] for i, n in enumerate((7, 1, 30, 60, 2, 16, 9))]
    starts = [0, 0, 11, 0, 1, 15, 3]
    cache = engine.new_cache(len(prompts)).array
    for row, (ids, start) in enumerate(zip(prompts, starts, strict=True)):
        if start:
            engine.new_pass(cache[:, row : row + 1], start, 1).run([ids[:start]], [0])
    rest = [ids[start:] for ids, start in zip(prompts, starts, strict=True)]
    found = engine._pass(cache, [len(ids) for ids in rest], 1).run(rest, starts)
    for ids, behind in zip(prompts, found, strict=True):
        np.testing.assert_array_equal(behind[0], logits(engine, [len(ids)], ids)[-1])
    engine.close()


def test_the_same_bits_by_all_threads_and_by_the_caller_alone(
    tiny_bundle: Path, precision: str
) -> None:
    facts = read_manifest(tiny_bundle).model
    options = EngineOptions(threads=3, fewer_threads=True)
    engine = NumbaEngine(tiny_bundle / f"numba-{precision}", facts, options)
    steady = opened(tiny_bundle, precision, 3)
    expected = logits(steady, [60])
    ways = set()
    for cuts in (*CUTS, *[[1] * 60] * 3):
        np.testing.assert_array_equal(logits(engine, cuts), expected)
        ways.add(engine.team._was_alone)
    assert ways == {True, False}
    for alone in (True, False):
        engine.team._paces = {60: Pace(alone=alone)}
        before = engine.team._control[t.EPOCH]
        np.testing.assert_array_equal(logits(engine, [60]), expected)
        assert engine.team._control[t.EPOCH] - before == (0 if alone else 1)  # jobs of the team
    steady.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        logits(engine, [60])


def test_a_number_of_threads_that_is_asked_for_is_kept(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "threads_for", lambda *_: 2)
    for threads, may_differ in ((None, True), (2, False)):
        with loading.load(tiny_bundle, "numba", "int8", threads=threads) as slm:
            assert slm.threads == 2
            assert isinstance(slm._engine, NumbaEngine)
            assert (slm._engine.team._paces is not None) is may_differ


def test_sleeping_threads_are_woken(engine: NumbaEngine) -> None:
    expected = logits(engine, CUTS[0])
    control = engine.team._control
    flags = [t.SLEEPERS + t.LINE * thread for thread in (1, 2)]
    for _ in range(3):
        end = monotonic() + 30
        while not control[flags].all():  # longer than they wait for work
            assert monotonic() < end
            sleep(0.01)
        np.testing.assert_array_equal(logits(engine, [60]), expected)
    for pause in (0.0005, 0.001, 0.002, 0.004, 0.008) * 10:  # about when they fall asleep
        sleep(pause)
        np.testing.assert_array_equal(logits(engine, [2], IDS[:2]), expected[:2])


def test_several_callers_at_once(engine: NumbaEngine, tiny_bundle: Path) -> None:
    """With passes of all sizes, so that the buffers grow meanwhile."""
    prompts = [IDS[i:] for i in range(40)]
    alone = opened(tiny_bundle)
    expected = [logits(alone, [len(ids)], ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(lambda ids: logits(engine, [len(ids)], ids), prompts))
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sizes", [(50, 90), (90, 50)])
def test_buffers_never_shrink(engine: NumbaEngine, sizes: tuple[int, int]) -> None:
    """Two callers that both find them too small, while a third computes."""
    with engine.team.idle():
        callers = [threading.Thread(target=engine._make_room, args=(size, 0)) for size in sizes]
        for caller in callers:
            caller.start()
            sleep(0.1)
    for caller in callers:
        caller.join()
    assert engine._rows == 90


def came_to(threads: int) -> bool:
    """Whether the process has so many, in the end."""
    latest = monotonic() + 30
    while _thread._count() != threads and monotonic() < latest:
        sleep(0.01)
    return _thread._count() == threads


def test_threads_end_with_the_engine(tiny_bundle: Path) -> None:
    for ending in ("close", "forgotten", "asleep"):
        before = _thread._count()
        engine = opened(tiny_bundle, threads=4)
        assert _thread._count() == before  # none before there is work
        logits(engine, [60])
        assert came_to(before + 3)
        if ending == "asleep":
            sleep(0.5)
        if ending != "forgotten":
            engine.close()
            engine.close()
        del engine
        gc.collect()
        assert came_to(before)


def test_a_closed_engine_refuses(engine: NumbaEngine) -> None:
    cache = engine.new_cache(1).array
    step: Any = engine.new_pass(cache, 1, 1)
    step.run([[70]], [0])
    team = engine.team
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        step.run([[70]], [1])
    with pytest.raises(EngineError, match="closed"):
        engine.new_pass(cache, 1, 1)
    with pytest.raises(EngineError, match="closed"):  # a caller who asked just before the end
        team.run(step._address)


@pytest.mark.parametrize("ids", [[-1, 70], [70, 417], [447, 70], [2**40, 1], [-(2**63), 1]])
def test_ids_that_the_model_does_not_have(engine: NumbaEngine, ids: list[int]) -> None:
    step = engine.new_pass(engine.new_cache(1).array, 2, 1)
    with pytest.raises(EngineError, match="vocabulary"):
        step.run([ids], [0])
    step.run([[0, 416]], [0])


@pytest.mark.parametrize("starts", [(0, 127), (-1, 0), (128, 0), (0, 2**40), (-(2**62), 0)])
def test_positions_that_the_model_does_not_have(
    engine: NumbaEngine, starts: tuple[int, int]
) -> None:
    step = engine.new_pass(engine.new_cache(2).array, 2, 1)
    with pytest.raises(EngineError, match="positions"):
        step.run([[70, 71]] * 2, starts)
    step.run([[70, 71]] * 2, [126, 0])


def test_memory_of_an_answer_is_its_own(engine: NumbaEngine) -> None:
    """Nothing is written but the new positions of the rows asked for."""
    cache = engine.new_cache(4).array
    cache[:] = np.float16(3)
    engine.new_pass(cache[:, 1:3], 5, 1).run([IDS[:5]] * 2, [0, 40])
    layers, rows, heads, positions, size = cache.shape
    blocks = layers // 2, rows, heads, positions // LANES, size, LANES  # of keys
    keys = cache[::2].reshape(blocks).swapaxes(-1, -2).reshape(cache[::2].shape)
    for part in (keys, cache[1::2]):
        for row, start in ((1, 0), (2, 40)):
            assert (part[:, row, :, start : start + 5] != 3).any(axis=(1, 3)).all()
            part[:, row, :, start : start + 5] = 3
    assert (keys == 3).all()
    assert (cache[1::2] == 3).all()


# -- what would hang: in processes of their own --------------------------------------

OPENED = """
import random, signal, sys, time
from pathlib import Path
import numpy as np
from edge_slm_runtime import EdgeSlmError, read_manifest
from edge_slm_runtime.engines import thread_team
from edge_slm_runtime.engines.base import EngineOptions
from edge_slm_runtime.engines.numba_engine import NumbaEngine
bundle = Path(sys.argv[1])
engine = NumbaEngine(bundle / "numba-int8", read_manifest(bundle).model, EngineOptions(threads=3))
step = engine.new_pass(engine.new_cache(1).array, 2, 1)
def run():
    return step.run([[70, 71]], [0]).copy()
"""


def test_an_interrupted_pass_leaves_sound_threads(tiny_bundle: Path) -> None:
    """Ctrl-C at any moment, and then another pass."""
    out = python(
        OPENED
        + """
expected = run()
class Stop(Exception): ...
def stop(*_):
    raise Stop
signal.signal(signal.SIGALRM, stop)
draw, end, stopped = random.Random(1), time.monotonic() + 20, 0
while stopped < 300 and time.monotonic() < end:
    asleep = stopped % 2
    if asleep:  # then they are woken before it begins
        time.sleep(0.01)
    try:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 1e-4 if asleep else 1e-3))
        while True:
            run()
    except Stop:
        stopped += 1
    assert (run() == expected).all()
print(stopped > 20)
""",
        str(tiny_bundle),
    )
    assert out.split() == ["True"]


def test_a_thread_that_cannot_be_started(tiny_bundle: Path) -> None:
    """As in a container that allows too few; later there may be room."""
    out = python(
        OPENED
        + """
real, left = thread_team.start_new_thread, 1
def start(*arguments):
    global left
    if left == 0:
        raise RuntimeError("can't start new thread")
    left -= 1
    real(*arguments)
thread_team.start_new_thread = start
for _ in range(2):
    try:
        run()
    except EdgeSlmError as error:
        print(error.code)
thread_team.start_new_thread = real
alone = NumbaEngine(bundle / "numba-int8", engine.decoder, EngineOptions(threads=1))
other = alone.new_pass(alone.new_cache(1).array, 2, 1)
print((run() == other.run([[70, 71]], [0])).all())
""",
        str(tiny_bundle),
    )
    assert out.split() == ["engine", "engine", "True"]
