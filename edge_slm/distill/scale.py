"""Sampling and scoring of many requests on many processes or machines, by Ray Data.

The same functions as without Ray, mapped over blocks of rows. If a worker dies, another one
computes its block again; results are ordered by the number of their row, and the file is
written when all are there, so that no row is lost or duplicated.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edge_slm.distill.generate import Episode, EpisodeGenerator
from edge_slm.distill.rewards import Reward
from edge_slm.distill.samples import Sample
from edge_slm.progress import Progress
from edge_slm_converters.text_side import read_schema
from edge_slm_runtime import errors
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import (
    BadSetting,
    DependencyMissing,
    EdgeSlmError,
    EngineError,
    TargetExists,
)
from edge_slm_runtime.files import write_jsonl

Row = dict[str, Any]
Work = Callable[[list[Row]], list[Row]]
_BLOCK = 512  # rows; computed again when a worker dies
_ATTEMPTS = 4  # at one block; then the block is what kills its workers


def sample_with_ray(
    checkpoint: str | Path,
    episodes: Sequence[Episode],
    out: Path,
    *,
    workers: int = 2,
    temperature: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """The answers of `EpisodeGenerator(checkpoint)` as JSONL, one row per episode, in order:
    request, task, words, relevance, seed, text, ended.

    workers: processes, each with a GPU if the cluster has any, else with a core. Every
    machine must be able to read the checkpoint under this path. Uses the cluster of
    RAY_ADDRESS, else starts Ray here until the end. Raises TargetExists,
    DependencyMissing, BadSetting (more workers than the cluster has room for), what
    `EpisodeGenerator` raises, and EngineError when workers keep dying.
    """
    read_schema(Path(checkpoint))  # raises here, not in every worker
    rows = [{"request": e.request, **e.command.as_dict(), "seed": e.seed} for e in episodes]
    work = partial(_sampling, str(checkpoint), temperature)
    return _run(
        work, rows, out, size=lambda row: row["words"] or 0, workers=workers, progress=progress
    )


def score_with_ray(
    make: Callable[[], Reward],
    samples: Sequence[Sample],
    out: Path,
    *,
    workers: int = 2,
    progress: Progress | None = None,
) -> Path:
    """The scores of `make()` as JSONL, one row per sample, in order: the sample's fields, reward.

    make: called once in every worker; for example a `functools.partial` of
    `make_reward`, without a cache, for processes cannot share one. Otherwise as
    `sample_with_ray`.
    """
    rows = [asdict(sample) for sample in samples]
    work = partial(_scoring, make)
    return _run(
        work, rows, out, size=lambda row: len(row["response"]), workers=workers, progress=progress
    )


def _sampling(checkpoint: str, temperature: float) -> Work:
    generator = EpisodeGenerator(checkpoint)

    def work(rows: list[Row]) -> list[Row]:
        episodes = [
            Episode(
                row["request"], Command(row["task"], row["words"], row["relevance"]), row["seed"]
            )
            for row in rows
        ]
        answers = generator(episodes, temperature=temperature)
        return [{**row, **asdict(answer)} for row, answer in zip(rows, answers, strict=True)]

    return work


def _scoring(make: Callable[[], Reward]) -> Work:
    reward = make()

    def work(rows: list[Row]) -> list[Row]:
        scores = reward.score([Sample(**row) for row in rows])
        return [{**row, "reward": float(s)} for row, s in zip(rows, scores, strict=True)]

    return work


class _Attempts:
    """Counts the attempts at each block, because Ray itself has no limit."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, block: int) -> int:
        self._begun[block] += 1
        return self._begun[block]


class _Worker:
    """One process of the pool.

    Rows are sent as JSON, so that Ray does not guess their types, and errors as rows,
    because Ray would wrap them.
    """

    def __init__(self, make: Callable[[], Work], attempts: Any) -> None:
        self._make, self._attempts = make, attempts
        self._work: Work | None = None

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        import ray

        rows = [json.loads(row) for row in block["row"]]
        try:
            if ray.get(self._attempts.begin.remote(int(block["number"][0]))) > _ATTEMPTS:
                raise EngineError(
                    f"{_ATTEMPTS} workers died at the same rows",
                    "look at their memory; fewer workers leave more for each",
                )
            self._work = self._work or self._make()
            done = self._work(rows)
        except EdgeSlmError as error:
            done = [{"raised": [type(error).__name__, error.problem, error.hint]}] * len(rows)
        return {"number": block["number"], "row": [json.dumps(row) for row in done]}


def _run(
    make: Callable[[], Work],
    rows: Sequence[Row],
    out: Path,
    *,
    size: Callable[[Row], int],
    workers: int,
    progress: Progress | None,
) -> Path:
    """Maps the work over the rows, rows of similar `size` together; writes `out`."""
    if out.exists():
        raise TargetExists(f"{out} is there already", "give another file")
    # A few blocks for every worker, so that all are busy to the end.
    block = max(1, min(_BLOCK, len(rows) // (4 * max(1, workers))))
    order = sorted(range(len(rows)), key=lambda i: size(rows[i]), reverse=True)
    done: dict[int, Row] = {}
    with _ray(workers) as (ray, resources):
        attempts = ray.remote(num_cpus=0)(_Attempts).remote()
        mapped = ray.data.from_items(
            [{"number": i, "row": json.dumps(rows[i])} for i in order],
            override_num_blocks=max(1, len(rows) // block),
        ).map_batches(
            _Worker,
            fn_constructor_args=(make, attempts),
            batch_size=None,  # a whole block
            compute=ray.data.ActorPoolStrategy(size=workers),
            **resources,
        )
        for batch in mapped.iter_batches(batch_size=None):
            for number, text in zip(batch["number"], batch["row"], strict=True):
                row = json.loads(text)
                if "raised" in row:
                    name, problem, hint = row["raised"]
                    raise getattr(errors, name)(problem, hint)
                done[int(number)] = row
            if progress:
                progress(len(done), len(rows))
    write_jsonl((done[i] for i in range(len(rows))), out)
    return out


@contextmanager
def _ray(workers: int) -> Iterator[tuple[Any, Row]]:
    """(ray, resources of a worker). Uses a running Ray, else starts one and ends it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise DependencyMissing(
            "scaling out needs Ray Data", "pip install 'edge-slm[ray,train]'"
        ) from None
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        there = ray.cluster_resources()
        kind = "GPU" if there.get("GPU") else "CPU"
        if not 1 <= workers <= there[kind]:
            raise BadSetting(
                f"workers is {workers}", f"allowed here: 1 … {there[kind]:.0f} ({kind}s)"
            )
        yield ray, {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    finally:
        if started:
            ray.shutdown()
