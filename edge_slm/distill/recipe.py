"""A recipe: every choice of a training run in one validated TOML file.

Its digest is a part of the checkpoint, which so says how it was made. Paths are not part of
a recipe: data and output are arguments of the command.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from edge_slm.distill.split import HOLDOUT_PERCENT, Reading
from edge_slm_runtime.command import (
    ANY,
    RELEVANCE_LEVELS,
    WORD_EDGES,
    CommandSchema,
    Position,
    default_axes,
)
from edge_slm_runtime.decoder import Decoder, gpt2
from edge_slm_runtime.errors import DataError, DependencyMissing
from edge_slm_runtime.files import read_text

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
except ImportError:
    raise DependencyMissing(
        "reading a recipe needs pydantic", "pip install 'edge-slm[train]'"
    ) from None

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Count = Annotated[int, Field(ge=0)]
# Settings by section that are newer than published checkpoints.
_NEWER = {
    "data": (
        "dev_percent max_response_words sentences whole leave_out mix words cases spaced "
        "verbatim restated".split()
    ),
    "teacher": ["keep"],
    "reward": ["gated"],
    "hindsight": "cut_share fragment_share swaps bare_share bands top".split(),
    "model": "architecture kv_heads inner trim keep_layers".split(),
    "train": "evaluate_rows confidence preference".split(),
    "stages": ["rounded"],
    "explore": "engine keep own_share rounded".split(),
    "distillation": "weight top_k temperature".split(),
    "adapters": "tokens rank scale targets learning_rate".split(),
}
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # it becomes part of a token


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataRecipe(_Section):
    """Which samples, and which requests are held out (by hash, so a split never moves)."""

    tasks: tuple[TaskName, ...] = Field(min_length=1)
    max_rows: dict[str, Annotated[int, Field(ge=1)]] = {}  # per task; none = all
    holdout_percent: int = Field(default=HOLDOUT_PERCENT, ge=0, le=50)
    dev_percent: int = Field(default=0, ge=0, le=50)  # besides; 0: the held-out ones are
    max_request_words: int = Field(default=40, ge=1)
    max_response_words: int = Field(default=WORD_EDGES[-1] - 1, ge=1, lt=WORD_EDGES[-1])
    sentences: tuple[TaskName, ...] = ()  # tasks whose responses end in a full stop
    whole: bool = False  # without requests and responses that are not whole: see `Reading`
    leave_out: tuple[str, ...] = ()  # sources of rows, by the beginning of their "source"
    mix: dict[str, Annotated[float, Field(gt=0)]] = {}  # per task; shares of response words
    words: int = Field(default=0, ge=0)  # of all responses that are used, by `mix`; 0: all
    cases: dict[str, Literal["lower", "title"]] = {}  # per task, of requests
    spaced: bool = False  # whether a space precedes requests
    verbatim: tuple[TaskName, ...] = ()  # tasks whose requests are texts that answers show
    restated: tuple[TaskName, ...] = ()  # tasks whose answers begin with the request

    def reading(self) -> Reading:
        """How samples are read, for `read_samples`."""
        return Reading.of(self.model_dump())


class TeacherRecipe(_Section):
    """The teacher, and how many samples it writes before training begins."""

    kind: Literal["grammar", "bundle", "server", "transformers"]
    model: str = ""  # a bundle; the server's name of it; or a folder or hub name
    source: Literal["invent", "data"] = "invent"  # requests: its own, or those of the data
    requests: int = Field(default=1000, ge=1)  # per task
    candidates: int = Field(default=4, ge=1)  # answers per request
    keep: int = Field(default=0, ge=0)  # best candidates by reward; 0: all
    temperature: float = Field(default=0.9, ge=0)


class RewardRecipe(_Section):
    """Weights of the parts of the reward; a part of weight 0 is not computed."""

    gated: bool = False  # fluency multiplies the mean of the others; cosines count up to 0.7
    relevance: float = Field(default=1.0, ge=0)
    keywords: float = Field(default=0.0, ge=0)
    fluency: float = Field(default=0.0, ge=0)
    judge: float = Field(default=0.0, ge=0)
    judge_model: str = ""  # the server's name of it


class HindsightRecipe(_Section):
    """Variants of samples, and the outcomes that become commands."""

    cuts: dict[str, Count] = {}  # per task: length variants per sample, whole at their length
    cut_share: float = Field(default=1.0, ge=0, le=1)  # at most, of the words of all responses
    fragments: dict[str, Count] = {}  # per task: requests made of phrases of the response
    fragment_share: float = Field(default=1.0, ge=0, le=1)  # at most, of all samples
    swaps: dict[str, Count] = {}  # per task: copies with another quoted text on both sides
    mismatch_share: float = Field(default=0.12, ge=0, lt=1)
    command_dropout: float = Field(default=0.1, ge=0, lt=1)
    bare_share: float = Field(default=0.0, ge=0, lt=1)  # records with all axes left open
    plain: bool = False  # supervised training: commands have a task alone
    levels: int = Field(default=RELEVANCE_LEVELS, ge=2, le=20)
    quantiles: Literal["task", "global"] = "task"
    bands: int = Field(default=1, ge=1)  # of length, each with levels of its own
    top: float | None = Field(default=None, gt=0)  # reward of the highest level; None: a quantile
    position: Position = "bottom"  # of the command, seen from the request
    capacity: int = Field(default=1_000_000, ge=1)  # samples the buffer keeps per task


class ModelRecipe(_Section):
    """The shape of a fresh model; with `init`, only `trim`, `keep_layers`, `positions` and
    `dropout` count. With a teacher checkpoint, the vocabulary is its own."""

    init: str = ""  # to start from: a checkpoint's folder or hub name, or a GGUF file
    trim: int = Field(default=0, ge=0)  # with `init`: tokens to keep, those that the data uses
    keep_layers: tuple[int, ...] = ()  # with `init`: the layers to keep, from 0; (): all
    architecture: Literal["gpt2", "llama"] = "gpt2"
    vocab_size: int = Field(default=6144, ge=512)
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=384, ge=8)
    heads: int = Field(default=6, ge=1)
    kv_heads: int = Field(default=0, ge=0)  # of a llama; 0: as many as heads
    inner: int = Field(default=0, ge=0)  # width of the feed-forward layer; 0: the usual one
    positions: int = Field(default=256, ge=32)
    dropout: float = Field(default=0.05, ge=0, lt=1)  # a llama has none

    @model_validator(mode="after")
    def _fits_together(self) -> ModelRecipe:
        if list(self.keep_layers) != sorted({n for n in self.keep_layers if n >= 0}):
            raise ValueError("keep_layers must be numbers from 0 on, in rising order")
        if self.width % self.heads:
            raise ValueError("width must be a multiple of heads")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")
        if self.architecture == "gpt2" and self.kv_heads not in (0, self.heads):
            raise ValueError("a gpt2 has as many kv_heads as heads; leave kv_heads out")
        if self.architecture == "llama" and self.width // self.heads % 2:
            raise ValueError("width of a head, width ÷ heads, must be even")
        return self

    def decoder(self) -> Decoder:
        """Shape and traits of a fresh model."""
        sizes: dict[str, Any] = {
            "layers": self.layers,
            "width": self.width,
            "heads": self.heads,
            "vocab_size": self.vocab_size,
            "positions": self.positions,
        }
        if self.architecture == "gpt2":
            return gpt2(**sizes, inner=self.inner or 4 * self.width)
        head_width = self.width // self.heads
        return Decoder(
            architecture="llama",
            kv_heads=self.kv_heads or self.heads,
            head_width=head_width,
            # As many weights as a plain layer of 4 × width, rounded up to a multiple of 32.
            inner=self.inner or -(-8 * self.width // (3 * 32)) * 32,
            norm="rms",
            norm_epsilon=1e-5,
            position="rotary",
            rope_theta=10000.0,
            mlp="gated",
            activation="silu",
            attention_scale=(head_width**-0.5,) * self.layers,
            tied=True,
            **sizes,
        )


class TrainRecipe(_Section):
    """Settings of the training, for every stage."""

    batch_tokens: int = Field(default=8192, gt=0)  # per optimizer step, padding included
    micro_tokens: int = Field(default=0, ge=0)  # per forward pass on one device; 0 = all
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    clip: float = Field(default=1.0, gt=0)
    countdown: float = Field(default=0.0, ge=0)  # weight of the auxiliary word-count loss
    confidence: float = Field(default=0.0, ge=0)  # weight of the loss of judging own answers
    preference: float = Field(default=0.0, ge=0)  # weight of the loss of a pair (DPO)
    precision: Literal["bf16", "fp32", "auto"] = "bf16"  # auto: the faster one, measured
    compile: bool = True
    gradient_checkpointing: bool = False
    save_every: int = Field(default=200, ge=1)  # steps
    evaluate_every: int = Field(default=200, ge=1)  # steps
    evaluate_rows: int = Field(default=0, ge=0)  # held-out records to evaluate on; 0: all


class DistillationRecipe(_Section):
    """Learning from the next-token distributions of a teacher checkpoint (`soft_labels`)."""

    weight: float = Field(default=0.0, ge=0, le=1)  # of their loss; that of the texts has the rest
    top_k: int = Field(default=32, ge=1)  # likeliest tokens that are kept of a distribution
    temperature: float = Field(default=1.0, gt=0)


class StageRecipe(_Section):
    """One stage of transfer: general text, all tasks, or some (cf. arXiv 2210.03871)."""

    kind: Literal["text", "commands"] = "commands"
    tasks: tuple[TaskName, ...] = ()  # none = all
    tokens: int = Field(gt=0)  # total, padding included
    learning_rate: float = Field(default=1.5e-3, gt=0)
    rounded: bool = False  # computes with int4 weights: see `rounding`


class ExploreRecipe(_Section):
    """Exploration rounds after Srivastava et al. (arXiv 1912.02877, section 2.2)."""

    rounds: int = Field(default=0, ge=0)
    requests: int = Field(default=1000, ge=1)  # drawn per task and round
    candidates: int = Field(default=2, ge=1)  # generations per request
    engine: Literal["torch", "own"] = "torch"  # own: our fastest engine, int8
    keep: int = Field(default=0, ge=0)  # best candidates by reward; 0: all
    own_share: float = Field(default=0.0, ge=0, lt=1)  # of a round's records; 0: all are used
    best: int = Field(default=100, ge=1)  # episodes that a command is made from
    bands: int = Field(default=1, ge=1)  # length bands that take turns; 1 is the paper's way
    temperature: float = Field(default=1.0, gt=0)
    tokens: int = Field(default=0, ge=0)  # trained per round
    rounded: bool = False  # computes with int4 weights, as in a stage
    learning_rate: float = Field(default=5e-4, gt=0)
    kl: float = Field(default=0.0, ge=0)  # weight of KL(model ‖ model before the round)
    entropy: float = Field(default=0.0, ge=0)  # weight of the entropy bonus


class AdaptersRecipe(_Section):
    """Adapters of single tasks, trained in the end on the frozen model (`distill.adapters`)."""

    tokens: int = Field(default=0, ge=0)  # per task, padding included; 0: there are none
    rank: int = Field(default=16, ge=1)
    scale: float = Field(default=2.0, gt=0)  # of what is added: alpha ÷ rank of other programs
    targets: tuple[Literal["qkv", "out", "up", "down"], ...] = ("qkv", "out", "up", "down")
    learning_rate: float = Field(default=1e-3, gt=0)


class Recipe(_Section):
    """A whole recipe."""

    name: str = "model"
    seed: int = 0
    data: DataRecipe
    teacher: TeacherRecipe | None = None
    reward: RewardRecipe = RewardRecipe()
    hindsight: HindsightRecipe = HindsightRecipe()
    model: ModelRecipe = ModelRecipe()
    train: TrainRecipe = TrainRecipe()
    distillation: DistillationRecipe = DistillationRecipe()
    stages: tuple[StageRecipe, ...] = Field(min_length=1)
    explore: ExploreRecipe = ExploreRecipe()
    adapters: AdaptersRecipe = AdaptersRecipe()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        tasks, model = self.data.tasks, self.model
        if len(set(tasks)) != len(tasks) or ANY in tasks:
            raise ValueError(f"data.tasks must be different names, none of them {ANY!r}")
        data, hindsight = self.data, self.hindsight
        per_task = {**data.max_rows, **data.mix, **data.cases, **hindsight.cuts}
        named = [
            *per_task,
            *data.verbatim,
            *data.restated,
            *hindsight.fragments,
            *hindsight.swaps,
            *(task for stage in self.stages for task in stage.tasks),
        ]
        if unknown := sorted(set(named) - set(tasks)):
            raise ValueError(f"settings for {unknown[0]!r}, which is not in data.tasks")
        if all(stage.kind == "text" for stage in self.stages):
            raise ValueError("stages: one of them must be of kind 'commands'")
        least = len(CommandSchema(default_axes(tasks)).special_tokens()) + 256
        if model.vocab_size < least:
            raise ValueError(f"model.vocab_size must hold control tokens and bytes: {least}")
        if self.train.batch_tokens < model.positions:
            raise ValueError("train.batch_tokens must be at least model.positions")
        if 0 < self.train.micro_tokens < model.positions:
            raise ValueError("train.micro_tokens must be at least model.positions")
        budgets = [stage.tokens for stage in self.stages]
        budgets += [self.explore.tokens] if self.explore.rounds else []
        budgets += [self.adapters.tokens] if self.adapters.tokens else []
        if min(budgets) < self.train.batch_tokens:
            raise ValueError(
                "tokens of every stage and round, and of adapters, must be at least "
                "train.batch_tokens"
            )
        if not self.adapters.targets:
            raise ValueError("adapters.targets must name a matrix")
        reward = self.reward
        if (
            not reward.relevance
            + reward.keywords
            + reward.judge
            + reward.fluency * (not reward.gated)
        ):
            raise ValueError("reward: one of the weights must be above 0")
        if self.teacher and self.teacher.kind == "bundle" and self.teacher.source != "data":
            raise ValueError("teacher: a bundle invents no requests; set source = 'data'")
        if data.words and not data.mix:
            raise ValueError("data.words needs data.mix")
        if data.mix and set(data.mix) != set(tasks):
            raise ValueError("data.mix must name every task")
        return self

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Raises DataError: not found, not TOML, or a setting that does not fit, by name."""
        try:
            return cls.model_validate(tomllib.loads(read_text(Path(path))))
        except OSError as error:
            raise DataError(f"cannot read recipe {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"recipe {path} is not TOML: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(
                ": ".join(filter(None, [f"recipe {path}", where, first["msg"]]))
            ) from None

    def with_init(self, init: str) -> Recipe:
        """The recipe with another model to start from."""
        return self.model_copy(update={"model": self.model.model_copy(update={"init": init})})

    def plain(self) -> Recipe:
        """The baseline: supervised training on the pairs alone, for as many tokens."""
        h = {"plain": True, "cuts": {}, "fragments": {}, "swaps": {}, "mismatch_share": 0.0}
        extra = self.explore.rounds * self.explore.tokens
        *first, last = self.stages
        last = last.model_copy(update={"tokens": last.tokens + extra})
        return self.model_copy(
            update={
                "name": f"{self.name}-plain",
                "teacher": None,  # the samples that it wrote are there
                "hindsight": self.hindsight.model_copy(update=h),
                "train": self.train.model_copy(
                    update={"countdown": 0.0, "confidence": 0.0, "preference": 0.0}
                ),
                "distillation": DistillationRecipe(),
                "stages": (*first, last),
                "explore": ExploreRecipe(),
                "adapters": AdaptersRecipe(),
            }
        )

    def digest(self) -> str:
        """sha256 of the settings, independent of the file's formatting."""
        canonical = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """The settings, JSON-ready. Without newer ones at their defaults, so that the digest
        of an older recipe stays as it is."""
        data = self.model_dump(mode="json")
        for section, names in _NEWER.items():
            own, stored = getattr(self, section), data[section]
            parts = zip(own, stored, strict=True) if isinstance(own, tuple) else [(own, stored)]
            for part, values in parts:
                for name in names if part is not None else ():
                    default = type(part).model_fields[name].default
                    if values[name] == json.loads(json.dumps(default)):
                        del values[name]
            if stored == {}:
                del data[section]
        return data
