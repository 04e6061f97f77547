"""The interface of an engine, ours or a peer's, to the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request. request, words: for our own runtime, whose tokenising is part of its
    TTFT. ids: what the model sees, which peers are given as they are."""

    request: str
    words: int
    ids: tuple[int, ...]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Prompt:
        """From JSON data."""
        return cls(data["request"], data["words"], tuple(data["ids"]))


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """A greedy answer. seconds: from submission to each token; an engine that reports
    none in between gives the first and the last alone."""

    ids: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """What a fresh process needs to open a runner.

    runner: the module in this package. variant: the row's name. path: the bundle, the
    checkpoint or the file that it reads. step_bytes: weight bytes that one decode step
    reads. peer: another engine than ours, on the same weights. options: further
    arguments of `load` (our runtime).
    """

    runner: str
    variant: str
    engine: str
    precision: str
    path: str
    disk_bytes: int
    step_bytes: int
    peer: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, for `of`."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Spec:
        """From what `as_dict` returned."""
        return cls(**data)


class Runner(Protocol):
    """A loaded model. Greedy, and never ended by end-of-text: figures need equal work."""

    def single(self, prompt: Prompt, new_tokens: int) -> TimedAnswer:
        """One answer of exactly `new_tokens`."""

    def batch(self, prompts: Sequence[Prompt], new_tokens: int) -> list[tuple[int, ...]]:
        """Answers of exactly `new_tokens` to prompts of one length, computed together."""

    def logits(self, ids: Sequence[int]) -> Float32:
        """[S, V]: the predictions after each of S tokens; V may include padding."""

    def close(self) -> None:
        """Frees the model."""
