"""A recipe: every choice of a training run in one validated TOML file.

Its digest goes into the checkpoint, so a checkpoint can say how it was made.
Paths are not part of a recipe: data and output are arguments of the command.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from edge_slm.distill.split import HOLDOUT_PERCENT
from edge_slm_runtime.command import ANY, CommandSchema, default_axes
from edge_slm_runtime.errors import DataError, DependencyMissing

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
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # it becomes part of a token


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataRecipe(_Section):
    """Which samples, and which requests are held out (by hash, so a split never moves)."""

    tasks: tuple[TaskName, ...] = Field(min_length=1)
    max_rows: dict[str, Annotated[int, Field(ge=1)]] = {}  # per task; none = all
    holdout_percent: int = Field(default=HOLDOUT_PERCENT, ge=0, le=50)
    max_request_words: int = Field(default=40, ge=1)


class HindsightRecipe(_Section):
    """How samples are multiplied and which outcomes become commands."""

    cuts: dict[str, Count] = {}  # per task: length variants per sample, cut at clause ends
    fragments: dict[str, Count] = {}  # per task: requests made of phrases of the response
    mismatch_share: float = Field(default=0.12, ge=0, lt=1)
    command_dropout: float = Field(default=0.1, ge=0, lt=1)


class ModelRecipe(_Section):
    vocab_size: int = Field(default=6144, ge=512)
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=384, ge=8)
    heads: int = Field(default=6, ge=1)
    positions: int = Field(default=256, ge=32)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class TrainRecipe(_Section):
    tokens: int = Field(gt=0)  # total, padding included
    batch_tokens: int = Field(default=8192, gt=0)
    learning_rate: float = Field(default=1.5e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    save_every: int = Field(default=200, ge=1)  # steps
    evaluate_every: int = Field(default=200, ge=1)  # steps


class Recipe(_Section):
    name: str = "model"
    seed: int = 0
    data: DataRecipe
    hindsight: HindsightRecipe = HindsightRecipe()
    model: ModelRecipe = ModelRecipe()
    train: TrainRecipe

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        tasks, model = self.data.tasks, self.model
        if len(set(tasks)) != len(tasks) or ANY in tasks:
            raise ValueError(f"data.tasks must be different names, none of them {ANY!r}")
        per_task = {**self.data.max_rows, **self.hindsight.cuts, **self.hindsight.fragments}
        if unknown := sorted(set(per_task) - set(tasks)):
            raise ValueError(f"settings for {unknown[0]!r}, which is not in data.tasks")
        if model.width % model.heads:
            raise ValueError("model.width must be a multiple of model.heads")
        least = len(CommandSchema(default_axes(tasks)).special_tokens()) + 256
        if model.vocab_size < least:
            raise ValueError(f"model.vocab_size must hold control tokens and bytes: {least}")
        if not self.train.tokens >= self.train.batch_tokens >= model.positions:
            raise ValueError("train.tokens ≥ train.batch_tokens ≥ model.positions must hold")
        return self

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Raises DataError: not found, not TOML, or a setting that does not fit, by name."""
        try:
            return cls.model_validate(tomllib.loads(Path(path).read_text("utf-8")))
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

    def digest(self) -> str:
        """sha256 of the settings, independent of the file's formatting."""
        canonical = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
