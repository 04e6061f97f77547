"""The process that measures: a JSON job on stdin, its result on the last line of stdout.

Run by `edge_slm_bench.process` as `python -m edge_slm_bench.cell`. It imports as
little as it can, and only when the clock runs: memory and load are part of the figures.
Jobs, by "kind":

speed      one cell of the sweep in its scenario (`edge_slm_bench.scenarios`)
answers    commanded requests through our runtime, with their texts and statistics
logits     teacher-forced predictions of token sequences, to a file
endurance  many requests, resident memory along the way
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_slm_bench.runners import Runner

Job = Mapping[str, Any]


def run(job: Job, started: float) -> dict[str, Any]:
    """started: perf_counter() when loading began. Raises EdgeSlmError."""
    from edge_slm_bench.runners import Spec, open_runner
    from edge_slm_runtime.memory import peak_rss_mb

    spec = Spec.of(job["spec"])
    runner = open_runner(spec, job["threads"])
    load_ms = (time.perf_counter() - started) * 1000
    try:
        measured = KINDS[job["kind"]](runner, job)
    finally:
        runner.close()
    # The peak is of this process image alone.
    return {"load_ms": load_ms, "peak_rss_mb": peak_rss_mb(), **measured}


def _speed(runner: Runner, job: Job) -> dict[str, Any]:
    from edge_slm_bench.scenarios import run_scenario

    return run_scenario(runner, job)


def _answers(runner: Any, job: Job) -> dict[str, Any]:
    """Answers to the requests, `batch` at a time, `repetitions` times after one warm-up."""
    from edge_slm_runtime import Request

    requests = [Request(**request) for request in job["requests"]]
    for request in requests[:1]:
        list(runner.slm.generate_batch([replace(request, max_new_tokens=4)], 1))
    answers = [
        [answer.as_dict() for answer in runner.slm.generate_batch(requests, job.get("batch", 1))]
        for _ in range(job.get("repetitions", 1))
    ]
    return {"threads": runner.slm.threads, "answers": answers}


def _logits(runner: Runner, job: Job) -> dict[str, Any]:
    """Predictions of ids[prompt:] of each sequence, over the vocabulary of the tokenizer."""
    import numpy as np

    rows = []
    for sequence in job["sequences"]:
        ids, prompt = sequence["ids"], sequence["prompt"]
        rows.append(runner.logits(ids)[prompt - 1 : len(ids) - 1, : job["vocabulary"]])
    np.save(job["out"], np.concatenate(rows).astype(np.float32))
    return {}


def _endurance(runner: Runner, job: Job) -> dict[str, Any]:
    from edge_slm_bench.process import rss_mb
    from edge_slm_bench.runners import Prompt

    prompts = [Prompt.of(p) for p in job["prompts"]]
    total, every = job["requests"], max(1, job["requests"] // 50)
    series = []
    for done in range(1, total + 1):
        runner.single(prompts[done % len(prompts)], job["new_tokens"])
        if done % every == 0 or done in (1, total):
            series.append((done, rss_mb() or 0.0))
    return {"rss_mb": series}


KINDS: Mapping[str, Callable[[Any, Job], dict[str, Any]]] = {
    "speed": _speed,
    "answers": _answers,
    "logits": _logits,
    "endurance": _endurance,
}


def main() -> None:
    job, started = json.load(sys.stdin), time.perf_counter()
    from edge_slm_runtime.errors import EdgeSlmError, OutOfMemory

    try:
        result = run(job, started)
    except EdgeSlmError as error:
        result = {"error": [type(error).__name__, error.problem, error.hint]}
    except MemoryError:
        result = {"error": [OutOfMemory.__name__, "no memory left", ""]}
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    main()
