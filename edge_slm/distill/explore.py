"""An exploration round: command a little more than the best episodes achieved.

After Srivastava et al., arXiv 1912.02877, section 2.2: of the N best episodes, the mean
length is the commanded horizon, and the commanded return is drawn from U[M, M + S], M and S
being the mean and standard deviation of their returns. The generated episodes are scored
and join the buffer with the outcomes that they achieved.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm.distill.buffer import Scored
from edge_slm.distill.engine import EngineGenerator
from edge_slm.distill.generate import Episode, EpisodeGenerator, Generator
from edge_slm.distill.levels import Edges, Levels
from edge_slm.distill.precision import use_bf16
from edge_slm.distill.prepare import Prepared
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.rewards import Reward
from edge_slm.distill.samples import Sample
from edge_slm.journal import Journal
from edge_slm.progress import StageProgress
from edge_slm_runtime.command import WORD_EDGES, Command, count_words
from edge_slm_runtime.files import write_jsonl

_CHUNK = 512  # episodes generated together; a killed round repeats at most these


def command(task: str, best: Sequence[Scored], levels: Levels, rng: random.Random) -> Command:
    """The next command for a task, derived from its best episodes."""
    horizon = round(float(np.mean([sample.words for sample, _ in best])))
    returns = [reward for _, reward in best]
    mean, deviation = float(np.mean(returns)), float(np.std(returns))
    words = min(max(horizon, 1), WORD_EDGES[-1] - 1)
    return Command(task, words, levels.of(rng.uniform(mean, mean + deviation), words))


def plan(prepared: Prepared, edges: Edges, number: int) -> list[Episode]:
    """The episodes of round `number`: requests of the training side, each with a command
    derived from the best episodes of a random length band."""
    recipe = prepared.recipe.explore
    episodes = []
    for task in prepared.recipe.data.tasks:
        rng = random.Random(f"{prepared.recipe.seed}/{number}/{task}")
        best = prepared.buffer.best(task, recipe.best, recipe.bands)
        requests = sorted({pair.request for pair in prepared.pairs if pair.task == task})
        for request in rng.sample(requests, min(recipe.requests, len(requests))):
            asked = command(task, rng.choice(best), edges[task], rng)
            episodes += [
                Episode(request, asked, rng.getrandbits(31)) for _ in range(recipe.candidates)
            ]
    return episodes


def explore(
    prepared: Prepared,
    edges: Edges,
    number: int,
    checkpoint: Path,
    reward: Reward,
    out: Path,
    report: StageProgress,
) -> dict[str, Any]:
    """Generates round `number` and adds it to the buffer; returns its figures.

    out: JSONL of the episodes with their rewards; a finished one is read instead. A killed
    round continues after its last chunk.
    """
    if not out.exists():
        _generate(prepared, plan(prepared, edges, number), number, checkpoint, reward, out, report)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    ended = [row for row in rows if row["ended"]]
    own = [Sample(row["request"], row["text"], row["task"], "own") for row in ended]
    kept = _best(ended, prepared.recipe.explore.keep)
    prepared.buffer.add([own[i] for i in kept], [ended[i]["reward"] for i in kept])
    errors = [abs(row["words"] - sample.words) for row, sample in zip(ended, own, strict=True)]
    asked = [row["relevance"] for row in ended]
    got = [edges[s.task].of(row["reward"], s.words) for row, s in zip(ended, own, strict=True)]
    return {
        "episodes": len(rows),
        "ended": len(ended),
        "kept": len(kept),
        "mean_reward": round(float(np.mean([row["reward"] for row in ended])), 4),
        "mean_level_asked": round(float(np.mean(asked)), 2),
        "mean_level_achieved": round(float(np.mean(got)), 2),
        "mean_word_error": round(float(np.mean(errors)), 2),
    }


def _best(rows: Sequence[Mapping[str, Any]], keep: int) -> list[int]:
    """Indices of the `keep` rows of each task and request with the highest reward; 0: of all."""
    if not keep:
        return list(range(len(rows)))
    taken: Counter[tuple[str, str]] = Counter()
    best = []
    for i in sorted(range(len(rows)), key=lambda i: -rows[i]["reward"]):
        key = rows[i]["task"], rows[i]["request"]
        taken[key] += 1
        if taken[key] <= keep:
            best.append(i)
    return sorted(best)


def _generator(recipe: Recipe, checkpoint: Path) -> Generator:
    if recipe.explore.engine == "own":
        return EngineGenerator(checkpoint)
    return EpisodeGenerator(checkpoint, bf16=use_bf16(recipe.train.precision))


def _generate(
    prepared: Prepared,
    episodes: Sequence[Episode],
    number: int,
    checkpoint: Path,
    reward: Reward,
    out: Path,
    report: StageProgress,
) -> None:
    recipe = prepared.recipe
    path = out.with_suffix(".journal")
    with Journal(path, group=_CHUNK) as journal:
        generator = None
        for start in range(journal.count, len(episodes), _CHUNK):
            generator = generator or _generator(recipe, checkpoint)
            chunk = episodes[start : start + _CHUNK]
            answers = generator(chunk, temperature=recipe.explore.temperature)
            for episode, answer in zip(chunk, answers, strict=True):
                ended = answer.ended and count_words(answer.text) > 0
                row = {"request": episode.request, **episode.command.as_dict()}
                journal.append({**row, "text": answer.text, "ended": ended})
            report(f"explore {number}", start + len(chunk), len(episodes), "")
        rows = list(journal.rows())
    own = [Sample(row["request"], row["text"] or ".", row["task"], "own") for row in rows]
    scores = reward.score(own, lambda done, total: report(f"score round {number}", done, total, ""))
    write_jsonl(
        ({**row, "reward": round(float(s), 4)} for row, s in zip(rows, scores, strict=True)), out
    )
    path.unlink()
