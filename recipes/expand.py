"""Samples that a model writes itself: the best of several answers to requests without one.

    python recipes/expand.py CHECKPOINT requests.jsonl out/ --base BASE.gguf --samples samples/ \
        --each image=6000 video=2000

One step of expert iteration: answers are sampled (in bf16 where that is faster), those with a
fault that a reader sees at once are left out, and the rest is ranked by reward plus COHERENCE ×
mean log-probability under the model that the checkpoint was trained from, which knows English
and none of the prompts. The first of a request goes to out/best/, up to KEEP - 1 others to
out/more/, for smaller models, which need more text. Goes on where it was stopped: one file a
task.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from curate import WRITING

from edge_slm.distill.evaluate.faults import invented, quoted, repeats, unfinished
from edge_slm.distill.generate import Episode, EpisodeGenerator
from edge_slm.distill.precision import use_bf16
from edge_slm.distill.rewards.fluency import Fluency
from edge_slm.distill.rewards.keywords import Keywords
from edge_slm.distill.rewards.relevance import Relevance
from edge_slm.distill.rewards.weighted import Gated
from edge_slm.distill.samples import Sample
from edge_slm.distill.split import held_out
from edge_slm_runtime.command import Command
from edge_slm_runtime.files import write_jsonl
from edge_slm_runtime.keywords import coverage, words_of

ODD = re.compile(  # of tests: causes, negations
    r"\b(because|therefore|due to|so the|no one|nobody|not|no|without|please|in english)\b",
    re.IGNORECASE,
)
CANDIDATES, KEEP, TEMPERATURE = 4, 3, 0.75
LEAST = 0.58  # score
HELD_PERCENT = 6  # of requests, which the recipes hold out
COHERENCE = 0.15  # of the reward, per nat
WORDS = {  # asked for, at least and at most
    "image": (14, 70),
    "video": (24, 80),
    "design": (40, 80),
    "lettering": (20, 50),
    "scene": (8, 16),
    "tags": (4, 12),
}
WEIGHTS = {  # of sources of requests, by the beginning of their names; 1 for all others
    "globalwordnet": 0.15,
    "cmoa": 0.15,
    "COCO": 0.6,
}


def requests(
    path: Path, task: str, count: int, seed: int, things: Set[str] = frozenset()
) -> list[str]:
    """Up to `count` distinct requests for the task, drawn by the weights of their sources.

    things: words that may be asked of a scene, or have tags.
    """
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rng = random.Random(f"{seed}/{task}")
    if task == "tags":  # things, as their names are
        rows = [row for row in rows if "wordnet" in row["source"] and row["task"] == "image"]
        names = [re.sub(r"^(?:an?|the) ", "", row["request"]) for row in rows]
        texts = {name: 1.0 for name in names if things.issuperset(words_of(name))}
    elif task == "scene":  # words of captions, in any order
        rows = [row for row in rows if "COCO" in row["source"]]
        texts = {}
        for row in rows:
            words = sorted(set(words_of(row["request"])) & things)
            rng.shuffle(words)
            if len(words) >= 3:
                texts[", ".join(words[: rng.choice((3, 3, 4, 4, 5))])] = 1.0
    else:
        rows = [row for row in rows if row["task"] == task]
        if task != "lettering":
            rows = [
                r for r in rows if not (ODD.search(r["request"]) or WRITING.search(r["request"]))
            ]
        texts = {
            row["request"]: next(
                (w for name, w in WEIGHTS.items() if row["source"].startswith(name)), 1.0
            )
            for row in rows
        }
    # Weighted sampling without replacement (Efraimidis and Spirakis, 2006).
    order = sorted(texts, key=lambda text: -(rng.random() ** (1 / texts[text])))
    return [text for text in order if not held_out(text, HELD_PERCENT)][:count]


def faultless(task: str, request: str, text: str, known: Counter[str]) -> bool:
    """Without what a reader sees at once: no end, invented or rare words, repeats, writing."""
    words, asked = words_of(text), set(words_of(request))
    rare = [w for w in words if known[w] < 2 and w not in asked and w.isascii() and w.isalpha()]
    if not words or rare:
        return False
    if task == "tags":
        items = [item.strip() for item in text.lower().split(",")]
        distinct = len(set(items)) == len(items) and max(Counter(words).values()) <= 2
        return distinct and request.lower() not in items
    if invented(request, text) or unfinished(text) or repeats(text):
        return False
    if task == "lettering":
        return quoted(request, text) and text.count('"') == 2
    if task == "scene":  # short, so that a word said twice is a loop
        said = Counter(word for word in words if len(word) > 3)
        return coverage(request, text) == 1 and max(said.values(), default=1) == 1
    return task == "design" or bool(WRITING.search(request)) or not WRITING.search(text)


class Base:
    """Mean log-probability of answers under the model in a GGUF file, in its chat form."""

    def __init__(self, path: Path) -> None:
        import torch
        from tokenizers import Tokenizer

        from edge_slm.distill.model import gguf_model
        from edge_slm.distill.recipe import ModelRecipe

        model, tokenizer = gguf_model(ModelRecipe(init=str(path)))
        self._model = model.to(torch.bfloat16 if use_bf16("auto") else torch.float32).eval()
        self._tokenizer = Tokenizer.from_str(json.dumps(tokenizer))

    def score(self, pairs: Sequence[tuple[str, str]], rows: int = 48) -> list[float]:
        import torch

        encoded = []
        for request, text in pairs:
            head = f"<|im_start|>user\nDescribe: {request}<|im_end|>\n<|im_start|>assistant\n"
            prompt = self._tokenizer.encode(head).ids
            encoded.append((len(prompt), prompt + self._tokenizer.encode(text).ids))
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][1]))
        scores = [0.0] * len(encoded)
        with torch.inference_mode():
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                longest = max(len(encoded[i][1]) for i in batch)
                ids = torch.tensor(
                    [encoded[i][1] + [0] * (longest - len(encoded[i][1])) for i in batch]
                )
                hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                for row, i in enumerate(batch):
                    at, tokens = encoded[i]
                    logits = self._model.lm_head(hidden[row, at - 1 : len(tokens) - 1]).float()
                    log_p = logits.log_softmax(-1)
                    chosen = log_p.gather(1, torch.tensor(tokens[at:])[:, None])
                    scores[i] = float(chosen.mean())
        return scores


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("requests", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument(
        "--samples", type=Path, nargs="+", required=True, help="whose words are known"
    )
    parser.add_argument("--each", nargs="+", required=True, help="task=requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=256)
    given = parser.parse_args()
    known: Counter[str] = Counter()
    things: Counter[str] = Counter()
    for folder in given.samples:
        for file in folder.glob("*.jsonl"):
            for line in file.read_text("utf-8").splitlines():
                row = json.loads(line)
                asked = words_of(row["request"] or "")
                known.update(words_of(row["response"]) + asked)
                things.update(asked if row["task"] == "scene" else ())
    often = {word for word, times in things.items() if times > 3}
    places = [given.out / "best", given.out / "more"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    generate = EpisodeGenerator(given.checkpoint, batch=given.rows, bf16=use_bf16("auto"))
    reward = Gated([(0.5, Relevance()), (0.5, Keywords())], Fluency())
    base = Base(given.base)
    for task, count in (each.split("=") for each in given.each):
        if (places[-1] / f"{task}.jsonl").exists():
            continue
        asked = requests(given.requests, task, int(count), given.seed, often)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(asked), 512):
            rows += expand(
                task, asked[start : start + 512], generate, reward, base, known, given.seed
            )
            print(task, min(start + 512, len(asked)), "of", len(asked), "→", len(rows), flush=True)
        rows = [row for row in rows if row["score"] >= LEAST]
        for ranks, place in zip((range(1), range(1, KEEP)), places, strict=True):
            write_jsonl([row for row in rows if row["rank"] in ranks], place / f"{task}.jsonl")


def expand(
    task: str,
    asked: Sequence[str],
    generate: EpisodeGenerator,
    reward: Gated,
    base: Base,
    known: Counter[str],
    seed: int,
) -> list[dict[str, Any]]:
    least, most = WORDS[task]
    episodes = []
    for request in asked:
        rng = random.Random(f"{seed}/{task}/{request}")
        for i in range(CANDIDATES):
            words = round(math.exp(rng.uniform(math.log(least), math.log(most))))
            command = Command(task, words, generate.schema.levels - 1)
            episodes.append(Episode(request, command, rng.randrange(2**32) + i))
    outcomes = generate(episodes, temperature=TEMPERATURE)
    good = [
        Sample(e.request, o.text, task)
        for e, o in zip(episodes, outcomes, strict=True)
        if o.ended and faultless(task, e.request, o.text, known)
    ]
    if not good:
        return []
    scores = reward.score(good)
    if task != "tags":
        scores = scores + COHERENCE * np.array(base.score([(s.request, s.response) for s in good]))
    ranks: Counter[str] = Counter()
    rows = []
    for score, sample in sorted(zip(scores.tolist(), good, strict=True), key=lambda pair: -pair[0]):
        if (rank := ranks[sample.request]) < KEEP:
            rows.append(
                {
                    "id": f"own-{task}-{len(rows)}",
                    "task": task,
                    "request": sample.request,
                    "response": sample.response,
                    "source": "own",
                    "score": round(score, 4),
                    "rank": rank,
                }
            )
        ranks[sample.request] += 1
    return rows


if __name__ == "__main__":
    main()
