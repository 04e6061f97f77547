"""A real Ray on this machine, two workers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from edge_slm.distill.generate import Episode, EpisodeGenerator
from edge_slm.distill.recipe import RewardRecipe
from edge_slm.distill.rewards import Reward, make_reward
from edge_slm.distill.samples import Sample
from edge_slm.distill.scale import sample_with_ray, score_with_ray
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import BadSetting, EngineError, TargetExists

# Ray warns of settings that it makes itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
    pytest.mark.timeout(900),  # three processes import torch: seconds, or minutes if it is busy
]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One Ray for all tests: starting one takes seconds."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # its 15 starves on a busy machine
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def workers() -> list[psutil.Process]:
    """Those alive: Ray has ended some by the time that they are looked at."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "MapBatches(_Worker)" in " ".join(child.cmdline()):
                found.append(child)
    return found


EPISODES = [
    Episode(f"a paper boat, number {seed}", Command("image", words, seed % 10), seed)
    for seed, words in enumerate([5, 20, None] * 16)
]


def test_a_killed_worker_loses_nothing_and_doubles_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    seen: list[int] = []

    def kill_one(done: int, total: int) -> None:
        seen.append(done)
        if not killed:
            one = workers()[0]
            one.send_signal(signal.SIGKILL)
            killed.append(one.pid)

    out = sample_with_ray(tiny_checkpoint, EPISODES, tmp_path / "texts.jsonl", progress=kill_one)
    assert killed
    assert 0 < seen[0] < seen[-1] == len(EPISODES)  # in the middle
    rows = read(out)
    assert [row["seed"] for row in rows] == list(range(len(EPISODES)))
    alone = EpisodeGenerator(tiny_checkpoint, device="cpu")(EPISODES)
    assert [(row["text"], row["ended"]) for row in rows] == [(a.text, a.ended) for a in alone]
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_scores_are_those_without_ray(tmp_path: Path) -> None:
    samples = [
        Sample(f"a red fox {i}", "a red fox, " * (i % 4) + "soft light", "image") for i in range(20)
    ]
    make = partial(
        make_reward, RewardRecipe(relevance=0, keywords=1, fluency=1), None, bf16=False, server=None
    )
    rows = read(score_with_ray(make, samples, tmp_path / "scores.jsonl"))
    assert [row["request"] for row in rows] == [sample.request for sample in samples]
    assert [row["reward"] for row in rows] == pytest.approx(make().score(samples).tolist())


def test_an_error_of_a_worker_keeps_its_type(tmp_path: Path) -> None:
    judged = RewardRecipe(judge=1, judge_model="one that no server has")
    make = partial(make_reward, judged, None, bf16=False, server=None)
    with pytest.raises(BadSetting, match="judge needs"):
        score_with_ray(make, [Sample("a", "b", "image")], tmp_path / "scores.jsonl", workers=1)
    assert not list(tmp_path.iterdir())


def test_workers_that_keep_dying_end_the_work(tmp_path: Path) -> None:
    deadly: Callable[[], Reward] = partial(os._exit, 9)
    with pytest.raises(EngineError, match="4 workers died"):
        score_with_ray(deadly, [Sample("a", "b", "image")], tmp_path / "s.jsonl", workers=1)
    assert not list(tmp_path.iterdir())


def test_what_is_there_and_what_is_too_much(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="1 … 2"):
        sample_with_ray(tiny_checkpoint, EPISODES, tmp_path / "texts.jsonl", workers=3)
    (tmp_path / "texts.jsonl").touch()
    with pytest.raises(TargetExists):
        sample_with_ray(tiny_checkpoint, EPISODES, tmp_path / "texts.jsonl")
