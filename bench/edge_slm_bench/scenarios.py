"""How requests come to a loaded model, after MLPerf Inference (Reddi et al., arXiv 1911.02549).

single-stream  one after the other: latency
variations     one request under two commands in turn, as by a user who wants it longer: latency
offline        all at once, in batches: throughput
server         at random times (a Poisson process), to `concurrency` workers: goodput
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

from edge_slm_bench.energy import find_meter
from edge_slm_bench.runners import Prompt, Runner, TimedAnswer
from edge_slm_runtime.errors import EngineError

WARM_UP_TOKENS = 4


def run_scenario(runner: Runner, job: Mapping[str, Any]) -> dict[str, Any]:
    """Warm-up, then the timed part under the energy counter, where there is one."""
    prompts = [Prompt.of(p) for p in job["prompts"]]
    timed = {
        "single-stream": single_stream,
        "variations": variations,
        "offline": offline,
        "server": server,
    }
    again = job["scenario"] == "variations"
    if job["scenario"] == "offline":
        runner.batch(prompts[: job["batch"]], WARM_UP_TOKENS)
    else:
        first = runner.single(prompts[0], job["new_tokens"] if again else WARM_UP_TOKENS)
    with find_meter() as meter:
        measured = timed[job["scenario"]](runner, prompts, job)
    if again and runner.single(prompts[0], job["new_tokens"]).ids != first.ids:
        raise EngineError("a request gets another answer when its beginning is in the cache")
    return {**measured, "joules": meter.joules}


def single_stream(
    runner: Runner, prompts: Sequence[Prompt], job: Mapping[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    timings = [
        # From the second on: the warm-up used the first, which no engine shall profit from.
        _timing(answered(runner, prompts[i % len(prompts)], job["new_tokens"]))
        for i in range(1, job["repetitions"] + 1)
    ]
    return {"timings": timings, "seconds": time.perf_counter() - start}


def variations(runner: Runner, prompts: Sequence[Prompt], job: Mapping[str, Any]) -> dict[str, Any]:
    """The warm-up's request under another command, under its own, and so on. An engine that
    keeps the keys and values of the last prompt has only the command to compute."""
    turns = (Prompt.of(job["other"]), prompts[0])
    start = time.perf_counter()
    timings = [
        _timing(answered(runner, turns[i % 2], job["new_tokens"]))
        for i in range(job["repetitions"])
    ]
    return {"timings": timings, "seconds": time.perf_counter() - start}


def offline(runner: Runner, prompts: Sequence[Prompt], job: Mapping[str, Any]) -> dict[str, Any]:
    timings = []
    for _ in range(job["repetitions"]):
        start = time.perf_counter()
        rows = runner.batch(prompts[: job["batch"]], job["new_tokens"])
        seconds = time.perf_counter() - start
        timings.append({"total_ms": seconds * 1e3, "new_tokens": sum(map(len, rows))})
    return {"timings": timings, "seconds": sum(t["total_ms"] for t in timings) / 1e3}


def server(runner: Runner, prompts: Sequence[Prompt], job: Mapping[str, Any]) -> dict[str, Any]:
    """Every cell gets the same arrivals: the seed is that of the round."""
    draw = random.Random(job["round"])
    waiting: SimpleQueue[tuple[float, Prompt] | None] = SimpleQueue()
    timings: list[dict[str, Any]] = []
    failures: list[BaseException] = []
    # An engine that cannot serve two threads at once serves them in turn.
    turn = None if getattr(runner, "concurrent", False) else threading.Lock()

    def work() -> None:
        while (item := waiting.get()) is not None:
            arrived, prompt = item
            try:
                if turn:
                    turn.acquire()
                try:
                    late = time.perf_counter() - arrived
                    run = answered(runner, prompt, job["new_tokens"])
                finally:
                    if turn:
                        turn.release()
            except Exception as error:
                failures.append(error)
                return
            timings.append(_timing(run, late))

    workers = [threading.Thread(target=work) for _ in range(job["concurrency"])]
    start = due = time.perf_counter()
    for worker in workers:
        worker.start()
    for i in range(job["repetitions"]):
        due += draw.expovariate(job["rate"])
        time.sleep(max(0.0, due - time.perf_counter()))
        waiting.put((due, prompts[i % len(prompts)]))
    for _ in workers:
        waiting.put(None)
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return {"timings": timings, "seconds": time.perf_counter() - start}


def answered(runner: Runner, prompt: Prompt, new_tokens: int) -> TimedAnswer:
    """Raises EngineError when the work is not what was asked."""
    run = runner.single(prompt, new_tokens)
    if len(run.ids) != new_tokens:
        raise EngineError(f"{len(run.ids)} tokens came where {new_tokens} were asked")
    return run


def _timing(run: TimedAnswer, late: float = 0.0) -> dict[str, Any]:
    """late: seconds that the request waited before it was begun."""
    reported = len(run.seconds) == len(run.ids)
    steps = [(b - a) * 1e3 for a, b in pairwise(run.seconds)] if reported else []
    return {
        "total_ms": (late + run.seconds[-1]) * 1e3,
        "new_tokens": len(run.ids),
        "ttft_ms": (late + run.seconds[0]) * 1e3,
        "steps_ms": steps,
    }
