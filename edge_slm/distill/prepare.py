"""Prepares training data: read samples, vary, score, relabel, tokenise."""

from __future__ import annotations

import hashlib
import lzma
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm.distill.buffer import Buffer
from edge_slm.distill.hindsight import build_schema, relabel, with_support_of
from edge_slm.distill.levels import Edges, level_edges
from edge_slm.distill.lexicon import lexicon_of
from edge_slm.distill.packing import Encoded, encode_records, encode_text
from edge_slm.distill.recipe import Recipe
from edge_slm.distill.rewards import Reward
from edge_slm.distill.samples import Sample, load_samples
from edge_slm.distill.tokenizer import train_tokenizer
from edge_slm.distill.variants import vary
from edge_slm.progress import StageProgress, silent
from edge_slm_runtime.command import CommandSchema, default_axes
from edge_slm_runtime.errors import DataError


@dataclass(frozen=True, slots=True)
class Prepared:
    """The scored samples; the same recipe and data give the same object."""

    recipe: Recipe
    pairs: list[Sample]  # of the training side
    held: list[Sample]
    held_rewards: npt.NDArray[np.float32]
    buffer: Buffer
    lexicon: bytes = b""
    facts: dict[str, Any] = field(default_factory=dict)  # counts, for the model card


@dataclass(frozen=True, slots=True)
class Labelled:
    """The samples of the buffer as token ids, each with the command that it achieved."""

    schema: CommandSchema
    edges: Edges
    train: list[Encoded]
    valid: list[Encoded]
    too_long: int


def prepare(
    recipe: Recipe, data: Sequence[str | Path], reward: Reward, report: StageProgress = silent
) -> Prepared:
    """Raises DataError (unusable data, by file and line) and DependencyMissing."""
    report("read", 0, 1, "")
    pairs, held, lone = load_samples(data, recipe.data, recipe.seed)
    samples = vary(pairs, lone, recipe.hindsight, recipe.data.reading().held_percent, recipe.seed)
    report("read", 1, 1, f"{len(pairs)} pairs → {len(samples)} samples")
    scores = reward.score(samples + held, lambda done, total: report("score", done, total, ""))
    scores = scores * np.array([sample.quality for sample in samples + held], np.float32)
    buffer = Buffer(recipe.hindsight.capacity)
    buffer.add(samples, scores[: len(samples)].tolist())
    facts = {
        "digest": hashlib.sha256(repr((pairs, lone)).encode()).hexdigest(),
        "pairs": len(pairs),
        "held_out": len(held),
        "samples": len(samples),
        "samples_by_task_and_kind": _count(samples),
        "reward": reward.name,
        "mean_reward_by_task": _means(samples, scores[: len(samples)]),
    }
    words = lexicon_of(pairs + lone, recipe.model.init)
    return Prepared(recipe, pairs, held, scores[len(samples) :], buffer, words, facts)


def label(prepared: Prepared, tokenizer: Any) -> Labelled:
    """Levels from the present buffer, and all samples labelled with them."""
    recipe, h = prepared.recipe, prepared.recipe.hindsight
    samples, rewards = prepared.buffer.samples(), prepared.buffer.rewards()
    together = h.quantiles == "global"
    edges = level_edges(samples, rewards, h.levels, bands=h.bands, together=together, top=h.top)
    records = relabel(samples, rewards, edges, plain=h.plain)
    schema = build_schema(recipe.data.tasks, records, h.levels, h.position, **_spelling(recipe))
    schema = with_support_of(recipe.model.init, schema)
    positions = recipe.model.positions
    train, too_long = encode_records(records, tokenizer, schema, positions)
    held = relabel(prepared.held, prepared.held_rewards, edges, plain=h.plain)
    valid, _ = encode_records(held, tokenizer, schema, positions)
    return Labelled(schema, edges, train, valid, too_long)


def with_own(labelled: Labelled, share: float, seed: str) -> Labelled:
    """With as many of the other training records as make own episodes `share` of all; 0: all."""
    own = [e for e in labelled.train if e.record and e.record.kind == "own"]
    others = [e for e in labelled.train if not e.record or e.record.kind != "own"]
    count = round(len(own) * (1 - share) / share) if share else len(others)
    if count >= len(others):
        return labelled
    chosen = random.Random(seed).sample(others, count)
    return replace(labelled, train=own + chosen)


def bare_schema(recipe: Recipe) -> CommandSchema:
    """The grammar without support; it has all control tokens."""
    return CommandSchema(
        default_axes(recipe.data.tasks, recipe.hindsight.levels),
        position=recipe.hindsight.position,
        **_spelling(recipe),
    )


def _spelling(recipe: Recipe) -> dict[str, Any]:
    """What the grammar says of requests and answers."""
    data = recipe.data
    return {
        "cases": dict(data.cases),
        "spaced": data.spaced,
        "verbatim": data.verbatim,
        "restated": data.restated,
        "confidence": recipe.train.confidence > 0,
    }


def new_tokenizer(prepared: Prepared, general: str = "") -> Any:
    """A tokenizer of the recipe's size, trained on the pairs and a part of the general text."""
    recipe = prepared.recipe
    texts = [text for sample in prepared.pairs for text in (sample.request, sample.response)]
    share = general[: sum(map(len, texts)) // 2]  # most of it is to be prompts
    return train_tokenizer(
        [*texts, *share.split("\n\n")], bare_schema(recipe), recipe.model.vocab_size
    )


def read_text(paths: Sequence[str | Path]) -> str:
    """General text: .txt and .txt.xz files, or folders of them. Raises DataError."""
    pieces = []
    for given in map(Path, paths):
        files = sorted(given.glob("*.txt*")) if given.is_dir() else [given]
        if not files:
            raise DataError(f"no text file in {given}", "give .txt or .txt.xz files")
        for file in files:
            try:
                raw = file.read_bytes()
                pieces.append((lzma.decompress(raw) if file.suffix == ".xz" else raw).decode())
            except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
                raise DataError(f"cannot read {file}: {error}", "give UTF-8 text") from None
    return "\n\n".join(pieces)


def text_records(text: str, tokenizer: Any, positions: int) -> tuple[list[Encoded], list[Encoded]]:
    """(training pieces, about 1% held out) of general text."""
    pieces = encode_text(text, tokenizer, positions)
    return [p for i, p in enumerate(pieces) if i % 100], pieces[::100][:200]


def _count(samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for sample in samples:
        kinds = counts.setdefault(sample.task, {})
        kinds[sample.kind] = kinds.get(sample.kind, 0) + 1
    return counts


def _means(samples: Sequence[Sample], scores: npt.NDArray[np.float32]) -> dict[str, float]:
    tasks = np.array([sample.task for sample in samples])
    return {str(t): round(float(scores[tasks == t].mean()), 4) for t in np.unique(tasks)}
