"""Many clients of one server: `python bench/serve_load.py [BUNDLE] [--gguf FILE]`.

`edge-slm serve`, and llama.cpp's server (xllamacpp) with the same weights as a GGUF file, one
after the other: as many clients as asked, each of which streams one completion after the other
for some seconds. Prints requests, those that were lost, times to the first piece and tokens per
second. Then, of ours alone, requests of which a third leave at a random moment, with the memory
before and after. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

import edge_slm
from edge_slm_bench.process import rss_mb

TOKENS = 32
TEXTS = [f"a {what} in the snow" for what in ("fox", "boat", "cabin", "lamp", "dog", "tree")]
LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, rows, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.n_parallel, params.n_ctx, params.n_gpu_layers = rows, rows * 256, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.verbosity = 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(1e6)
"""


@dataclass
class Tally:
    """lost: answers that failed or had no end. first: seconds to the first piece."""

    whole: int = 0
    left: int = 0
    again: int = 0
    lost: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)


@contextmanager
def served(*command: str) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server whose first line is its address."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield urlsplit(process.stdout.readline().strip()).netloc, process.pid
    finally:
        process.terminate()
        process.wait()


async def ask(address: str, body: bytes, tally: Tally, leave_after: float | None = None) -> None:
    """One streamed completion, on a connection of its own."""
    host, _, port = address.rpartition(":")
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 429 " in status:
            tally.again += 1
            await asyncio.sleep(1)
            return
        seen, first, usage = b"", None, None
        while piece := await reader.read(1 << 16):
            now = time.perf_counter()
            if first is None and b"data: " in piece:
                first = now - started
            seen += piece
            if leave_after is not None and now - started > leave_after:
                tally.left += 1
                return
        for line in seen.splitlines():
            if line.startswith(b"data: {") and b'"usage"' in line:
                usage = json.loads(line[6:]).get("usage") or usage
        if b" 200 " not in status or b"[DONE]" not in seen or first is None or usage is None:
            tally.lost += 1
            return
        tally.whole += 1
        tally.tokens += usage["completion_tokens"]
        tally.first.append(first)
    except OSError:
        tally.lost += 1
    finally:
        writer.close()


def body_of(number: int) -> bytes:
    asked = {"prompt": f"{TEXTS[number % len(TEXTS)]} {number}", "max_tokens": TOKENS}
    return json.dumps(
        {**asked, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    ).encode()


async def clients(address: str, count: int, seconds: float) -> Tally:
    tally, end = Tally(), time.perf_counter() + seconds

    async def one(client: int) -> None:
        number = client
        while time.perf_counter() < end:
            await ask(address, body_of(number), tally)
            number += count

    await asyncio.gather(*(one(client) for client in range(count)))
    return tally


async def leaving(address: str, count: int, requests: int) -> Tally:
    tally, chance, numbers = Tally(), random.Random(1), iter(range(requests))

    async def one() -> None:
        for number in numbers:
            leaves = chance.random() * 0.2 if chance.random() < 1 / 3 else None
            await ask(address, body_of(number), tally, leaves)

    await asyncio.gather(*(one() for _ in range(count)))
    return tally


def report(name: str, tally: Tally, seconds: float) -> None:
    first = np.percentile(tally.first, [50, 99]) * 1e3 if tally.first else (0.0, 0.0)
    print(
        f"{name:12}{tally.whole:8} whole {tally.left:6} left {tally.again:6} told to come again "
        f"{tally.lost:4} lost   TTFT p50 {first[0]:7.1f} p99 {first[1]:7.1f} ms   "
        f"{tally.tokens / seconds:7.0f} tokens/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", type=Path, default=edge_slm.shipped_bundle())
    parser.add_argument("--gguf", type=Path, help="the same weights, for llama.cpp")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--requests", type=int, default=10_000, help="of clients that may leave")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    rows, threads = str(asked.rows), str(asked.threads)
    ours = [sys.executable, "-m", "edge_slm", "serve", str(asked.bundle)]
    with served(*ours, "--port", "0", "--rows", rows, "--threads", threads) as (address, process):
        asyncio.run(clients(address, 2, 1))
        report(
            "edge_slm", asyncio.run(clients(address, asked.clients, asked.seconds)), asked.seconds
        )
        before, started = rss_mb(process), time.perf_counter()
        tally = asyncio.run(leaving(address, asked.clients, asked.requests))
        report("  leaving", tally, time.perf_counter() - started)
        print(f"  memory {before:.1f} MiB before, {rss_mb(process):.1f} MiB after")
    if asked.gguf:
        with served(sys.executable, "-c", LLAMA, str(asked.gguf), rows, threads) as (address, _):
            asyncio.run(clients(address, 2, 1))
            tally = asyncio.run(clients(address, asked.clients, asked.seconds))
            report("llama.cpp", tally, asked.seconds)


if __name__ == "__main__":
    main()
