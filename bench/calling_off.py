"""How fast an answer ends that is called off: `python bench/calling_off.py BUNDLE`.

For each variant a session of four rows, of which three are always decoding. The fourth is
cancelled at a random moment of its prompt or of its answer, or has a deadline there: the time
from `cancel` until its result is there, and what deadlines are exceeded by. Then 1,000 answers
of which every other one is cancelled: the rest must be what `generate` gives, token by token.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import edge_slm
from edge_slm_bench.prompts import request_of
from edge_slm_bench.quick import chosen_variants
from edge_slm_runtime import SLM, Request, Session, read_manifest
from edge_slm_runtime.errors import EdgeSlmError

TEXTS = [f"a {what} in the snow" for what in ("fox", "boat", "cabin", "lamp", "dog", "tree")]
ROWS = 4


def long_answer(text: str, **settings: object) -> Request:
    return Request(text, max_new_tokens=100, no_repeat_ngram_size=0, **settings)  # type: ignore[arg-type]


@contextmanager
def busy_session(slm: SLM) -> Iterator[tuple[Session, Callable[[], None]]]:
    """A session, and what keeps all of its rows but one decoding."""
    with slm.session(ROWS) as session:
        others = [session.submit(long_answer(text)) for text in TEXTS[: ROWS - 1]]

        def keep_busy() -> None:
            for i, one in enumerate(others):
                if one.done:
                    others[i] = session.submit(long_answer(TEXTS[i]))

        yield session, keep_busy
        session.close(cancel=True)


def cancels(slm: SLM, request: Request, times: int, chance: random.Random) -> list[float]:
    """ms from `cancel`, at a random moment of the request's usual time, to the result."""
    found: list[float] = []
    with busy_session(slm) as (session, keep_busy):
        whole = session.submit(request).result.stats.total_ms
        while len(found) < times:
            keep_busy()
            stream = session.submit(request)
            time.sleep(chance.random() * whole / 1e3)
            started = time.perf_counter()
            stream.cancel()
            if stream.result.finish_reason == "cancelled":
                found.append((time.perf_counter() - started) * 1e3)
    return found


def deadlines(slm: SLM, request: Request, times: int, chance: random.Random) -> list[float]:
    """ms by which random deadlines are exceeded."""
    found: list[float] = []
    with busy_session(slm) as (session, keep_busy):
        whole = session.submit(request).result.stats.total_ms
        while len(found) < times:
            keep_busy()
            deadline = max(1e-3, chance.random() * whole)
            result = session.submit(request, deadline_ms=deadline).result
            if result.finish_reason == "deadline":
                found.append(result.stats.total_ms - deadline)
    return found


def wrong_after_cancels(slm: SLM, count: int, chance: random.Random) -> int:
    """Of `count` answers half of which are cancelled: how many others differ from `generate`."""
    requests = [long_answer(text) for text in TEXTS]
    expected = [slm.generate(request).token_ids for request in requests]
    wrong = 0
    with slm.session(ROWS, waiting=count) as session:
        streams = [session.submit(requests[i % len(requests)]) for i in range(count)]
        for i in chance.sample(range(1, count, 2), count // 2):
            time.sleep(chance.choice((0, 0.0005, 0.002)))
            streams[i].cancel()
        for i, stream in enumerate(streams):
            result = stream.result
            if result.finish_reason != "cancelled":
                wrong += result.token_ids != expected[i % len(expected)]
        assert (session.running, session.waiting) == (0, 0)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--cancels", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", help="names; default: all")
    asked = parser.parse_args()
    print(f"{'ms':18}{'prompt':>17}{'answer':>17}{'deadline over':>17}   others wrong")
    print(f"{'':18}" + f"{'p50':>8}{'p99':>9}" * 3)
    for variant in chosen_variants(read_manifest(asked.bundle), asked.variants):
        chance = random.Random(1)
        try:
            slm = edge_slm.load(
                asked.bundle,
                engine=variant.engine,
                precision=variant.precision,
                threads=asked.threads,
            )
        except EdgeSlmError as error:
            print(f"{variant.name:18}{error}")
            continue
        with slm:

            def tokens(text: str, slm: SLM = slm) -> int:
                return len(slm.check(Request(text, max_new_tokens=1)).prompt)

            prompt = Request(request_of(asked.prompt_tokens, tokens), max_new_tokens=1)
            cells = [
                cancels(slm, prompt, asked.times, chance),
                cancels(slm, long_answer("a red fox"), asked.times, chance),
                deadlines(slm, long_answer("a red fox"), asked.times, chance),
            ]
            figures = "".join(
                f"{np.percentile(cell, 50):8.2f}{np.percentile(cell, 99):9.2f}" for cell in cells
            )
            wrong = wrong_after_cancels(slm, asked.cancels, chance)
            print(f"{variant.name:18}{figures}   {wrong} of {asked.cancels}", flush=True)


if __name__ == "__main__":
    main()
