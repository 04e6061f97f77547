"""Thousands of mixed requests to each variant of a bundle: `python bench/soak.py BUNDLE`.

Two threads ask for whole answers, streams, batches and sessions' answers, greedy and sampled; they
close streams, abandon them, cancel, set deadlines, and now and then fork. Every answer that ends by
itself must be what the variant gave alone before, token by token; a forked child must be refused
the model; resident memory must not grow after the first tenth. When nothing ends for a minute, the
process ends with the stack of every thread. Exit code 1 if something of that fails.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Lock

from rich.console import Console
from rich.table import Table

import edge_slm
from edge_slm_bench.process import rss_mb
from edge_slm_bench.quick import chosen_variants
from edge_slm_runtime import SLM, Generation, Request, read_manifest
from edge_slm_runtime.errors import UsedAfterFork

HANGS_AFTER = 60  # seconds in which nothing begins
FLAT = 4.0  # MiB that memory may grow by after the first tenth: allocators keep some
TEXTS = [f"a {what} in the snow" for what in ("fox", "boat", "cabin", "lamp", "dog", "old tree")]
WAYS = {  # how often each is chosen
    "whole": 30,
    "stream": 15,
    "closed": 10,
    "abandoned": 10,
    "batch": 10,
    "session": 10,
    "cancelled": 10,
    "deadline": 5,
}


def requests_of(slm: SLM) -> list[Request]:
    """Greedy and sampled requests, with and without commands, where the model has some."""
    commands: list[dict[str, object]] = [{}]
    if slm.manifest.prompt.kind == "command":
        commands = [{"task": task, "words": 8} for task in slm.schema.tasks[:3]]
    sampling: list[dict[str, object]] = [{}]
    if slm.seeds:
        sampling.append({"temperature": 0.9, "top_k": 20, "seed": 5})
    return [
        Request(text, max_new_tokens=12 + 8 * (i % 3), **command, **drawn)  # type: ignore[arg-type]
        for i, text in enumerate(TEXTS)
        for command in commands
        for drawn in sampling
    ]


class Soak:
    """One variant under load; counts what happens and what is wrong."""

    def __init__(self, slm: SLM, seed: int) -> None:
        self.slm, self.seed = slm, seed
        self.requests = requests_of(slm)
        self.expected = [slm.generate(request).token_ids for request in self.requests]
        self.seen: Counter[str] = Counter()
        self._adding = Lock()
        self.memory: list[float] = []

    def run(self, total: int) -> None:
        """Raises what a thread raises."""
        numbers = count()
        marks = {total * tenth // 10 for tenth in range(1, 11)}

        def work(thread: int) -> None:
            chance = random.Random(f"{self.seed}/{thread}")
            while (number := next(numbers)) < total:
                faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
                if number % 500 == 250:
                    self.fork()
                self.one(chance.choices(list(WAYS), list(WAYS.values()))[0], chance)
                if number + 1 in marks:
                    gc.collect()
                    self.memory.append(rss_mb() or 0.0)

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work, thread) for thread in range(2)]:
                done.result()
        faulthandler.cancel_dump_traceback_later()

    def one(self, way: str, chance: random.Random) -> None:
        which = chance.sample(range(len(self.requests)), 4)
        requests = [self.requests[i] for i in which]
        expected = [self.expected[i] for i in which]
        self.count(way)
        if way == "whole":
            self.compare("alone", [self.slm.generate(requests[0])], expected[:1])
        elif way == "deadline":
            answer = self.slm.generate(requests[0], deadline_ms=chance.uniform(0.1, 20))
            self.compare("alone", [answer], expected[:1])
        elif way == "batch":
            self.compare("together", self.slm.generate_batch(requests, 4), expected)
        elif way in ("session", "cancelled"):
            with self.slm.session(3) as session:
                streams = [session.submit(request) for request in requests]
                if way == "cancelled":
                    time.sleep(chance.random() / 100)
                    for stream in streams[::2]:
                        stream.cancel()
                self.compare("together", [stream.result for stream in streams], expected)
        else:
            self.stream(way, requests[0], expected, chance)

    def stream(
        self, way: str, request: Request, expected: Sequence[tuple[int, ...]], chance: random.Random
    ) -> None:
        stream = self.slm.stream(request)
        if way == "stream":
            assert "".join(stream) == stream.result.text
            self.compare("alone", [stream.result], expected[:1])
            return
        for _ in zip(range(chance.randrange(4)), stream, strict=False):
            pass
        if way == "closed":
            stream.close()

    def compare(
        self, how: str, answers: Iterable[Generation], expected: Sequence[tuple[int, ...]]
    ) -> None:
        """Answers that were called off are not compared."""
        for answer, ids in zip(answers, expected, strict=True):
            if answer.finish_reason not in ("cancelled", "deadline"):
                self.count(f"compared {how}")
                self.count(f"different {how}", answer.token_ids != ids)

    def count(self, what: str, times: int = 1) -> None:
        with self._adding:
            self.seen[what] += times

    def fork(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads is the test
            child = os.fork()
        if child == 0:
            try:
                self.slm.generate(self.requests[0])
            except UsedAfterFork:
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        self.count("forks")
        self.count("wrong forks", os.waitpid(child, 0)[1] != 0)

    @property
    def grown(self) -> float:
        """MiB from the first tenth to the last."""
        return self.memory[-1] - self.memory[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--variants", nargs="+", help="names; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    table = Table("variant", "requests", "minutes", "alone / together", "different", "forks")
    table.add_column("MiB after 10 … 100%")
    failed = False
    for variant in chosen_variants(read_manifest(asked.bundle), asked.variants):
        how = {"engine": variant.engine, "precision": variant.precision}
        with edge_slm.load(asked.bundle, threads=asked.threads, isolate=False, **how) as slm:
            started = time.perf_counter()
            soak = Soak(slm, asked.seed)
            soak.run(asked.requests)
            seen, minutes = soak.seen, (time.perf_counter() - started) / 60
        # onnxruntime's 4-bit products depend on how many rows there are; docs/conversion.md.
        exact = variant.name != "onnx-int4"
        wrong = seen["different alone"] + exact * seen["different together"] + seen["wrong forks"]
        failed |= bool(wrong) or soak.grown > FLAT
        table.add_row(
            variant.name,
            f"{asked.requests:,}",
            f"{minutes:.1f}",
            f"{seen['compared alone']:,} / {seen['compared together']:,}",
            f"{seen['different alone']} / {seen['different together']}",
            f"{seen['forks']}, wrong {seen['wrong forks']}",
            " ".join(f"{mib:.0f}" for mib in soak.memory),
        )
        found = {**seen, "MiB": [round(mib, 1) for mib in soak.memory]}
        print(f"{variant.name}: {found}", file=sys.stderr, flush=True)
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
