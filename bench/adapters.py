"""What an adapter costs: `python bench/adapters.py [BUNDLE]`.

For each numba variant and for random adapters of several ranks, of all matrices and of the
queries', keys' and values' alone: bytes of the file; ms to add it to a running model from that
file, and to take it out again; ms per token with it and without, in turn, as medians and as
their ratio; and whether answers without it still are what they were before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

import edge_slm
from edge_slm_runtime import SLM, Request, read_manifest
from edge_slm_runtime.bundle import Manifest
from edge_slm_runtime.decoder import MATRICES
from edge_slm_runtime.deltas import Delta, Factors
from edge_slm_runtime.errors import EdgeSlmError

TEXT = "a red fox in the snow"


def random_delta(manifest: Manifest, rank: int, kinds: Sequence[str]) -> Delta:
    random, factors = np.random.default_rng(rank), {}
    for matrix, (inputs, outputs) in manifest.model.matrices().items():
        if matrix.rsplit(".", 1)[1] in kinds:
            shapes = (inputs, rank), (rank, outputs)
            parts = [random.normal(0, 0.02, shape).astype(np.float16) for shape in shapes]
            factors[matrix] = Factors(*parts)
    return Delta("random", "", manifest.base, factors)


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def ms_per_token(slm: SLM, adapter: str, tokens: int) -> float:
    request = Request(TEXT, adapter=adapter, max_new_tokens=tokens, no_repeat_ngram_size=0)
    trace = slm.trace(request, temperature=1.0, seed=1, keep_length=False)
    return float(np.median(np.diff(trace.seconds))) * 1e3


def measure(slm: SLM, file: Path, times: int, tokens: int) -> str:
    before = slm.generate(TEXT, adapter="", logprobs=True)
    added, removed = [], []
    for _ in range(times):
        added.append(milliseconds(lambda: slm.add_adapter(file)))
        removed.append(milliseconds(lambda: slm.remove_adapter("random")))
    slm.add_adapter(file)
    pairs = [[ms_per_token(slm, name, tokens) for name in ("", "random")] for _ in range(times)]
    after = slm.generate(TEXT, adapter="", logprobs=True)
    same = (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
    without, with_it = (median(column) for column in zip(*pairs, strict=True))
    ratio = median(b / a for a, b in pairs)
    return (
        f"{file.stat().st_size / 1e3:10.0f}{median(added):9.2f}{median(removed):9.3f}"
        f"{without:11.3f}{with_it:9.3f}{100 * (ratio - 1):+9.1f}%   {'yes' if same else 'NO'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", type=Path, default=edge_slm.shipped_bundle())
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    manifest = read_manifest(asked.bundle)
    print(f"{'':30}{'kB':>10}{'add ms':>9}{'remove':>9}{'ms/token':>11}{'with':>9}{'':10}   same")
    for variant in (one for one in manifest.variants if one.engine == "numba"):
        try:
            slm = edge_slm.load(
                asked.bundle, engine="numba", precision=variant.precision, threads=asked.threads
            )
        except EdgeSlmError as error:
            print(f"{variant.name}: {error}")
            continue
        with slm, tempfile.TemporaryDirectory() as folder:
            for rank in asked.ranks:
                for name, kinds in (("all", MATRICES), ("qkv", ("qkv",))):
                    file = Path(folder) / "random.safetensors"
                    file.write_bytes(random_delta(manifest, rank, kinds).to_bytes())
                    figures = measure(slm, file, asked.times, asked.tokens)
                    print(f"{variant.name}, rank {rank}, {name:<8}".ljust(30) + figures, flush=True)


if __name__ == "__main__":
    main()
