"""The process that measures one cell: a JSON job on stdin, its result on the last line of stdout.

Run by `edge_slm_bench.measure` as `python -m edge_slm_bench.cell`. It imports as
little as it can, because its own memory is part of the figure.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from edge_slm_bench.measure import request_of
from edge_slm_runtime.errors import EdgeSlmError
from edge_slm_runtime.memory import peak_rss_mb


def run(job: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    from edge_slm_runtime import Request, load

    slm = load(
        job["bundle"], engine=job["engine"], precision=job["precision"], threads=job["threads"]
    )
    load_ms = (time.perf_counter() - start) * 1000
    with slm:
        # The longest command: the length promise then keeps every run from ending early.
        words = slm.schema.axis("words").edges[-1] - 1

        def count(text: str) -> int:
            return len(slm.check(Request(text, words=words, max_new_tokens=1)).prompt)

        def timed(request: str, new_tokens: int) -> Any:
            return slm.generate(request, words=words, max_new_tokens=new_tokens).stats

        prompts = {n: request_of(n, count) for n in job["prompt_tokens"]}
        shortest = prompts[min(prompts)]
        threads = timed(shortest, 4).threads  # and warm
        ttft = {
            n: [timed(prompt, 2).ttft_ms for _ in range(job["samples"])]
            for n, prompt in prompts.items()
        }
        tpot = [timed(shortest, job["new_tokens"]).tpot_ms for _ in range(job["samples"])]
        generations = [slm.generate(**request).as_dict() for request in job["requests"]]
    return {
        "threads": threads,
        "load_ms": load_ms,
        "ttft_ms": ttft,
        "tpot_ms": tpot,
        "peak_rss_mb": peak_rss_mb(),  # of this process image alone
        "generations": generations,
    }


def main() -> None:
    try:
        result = run(json.load(sys.stdin))
    except EdgeSlmError as error:
        result = {"error": [type(error).__name__, error.problem, error.hint]}
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    main()
