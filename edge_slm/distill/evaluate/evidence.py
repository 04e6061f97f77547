"""The data of the figures: the texts for every command, and their scores.

Arrays are [samples, commands], nan where not asked (see `edge_slm_bench.metrics.quality`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edge_slm.distill.evaluate.grid import Grid
from edge_slm.distill.levels import Edges
from edge_slm.distill.rewards import Reward, Weighted
from edge_slm.distill.samples import Sample
from edge_slm.progress import StageProgress
from edge_slm_bench.metrics.quality import Float64
from edge_slm_runtime.command import count_words

Pair = tuple[Sample, str]


@dataclass(frozen=True, slots=True)
class Texts:
    """[samples][commands] texts, None where there is none; `asked`: words commanded."""

    rows: list[list[str | None]]
    asked: list[list[float]] = field(default_factory=list)

    def column(self, at: int = 0) -> list[str | None]:
        return [row[at] for row in self.rows]

    def only(self, at: int) -> Texts:
        return Texts([[row[at]] for row in self.rows])

    def words(self) -> Float64:
        return np.array(
            [[np.nan if t is None else count_words(t) for t in row] for row in self.rows], float
        )

    def pairs(self, samples: Sequence[Sample]) -> Iterator[Pair]:
        for sample, row in zip(samples, self.rows, strict=True):
            yield from ((sample, text) for text in row if text is not None)


class Scores:
    """The scores of texts; every distinct pair of sample and text is scored once.

    names: the training reward, its parts if it is a weighted mean, then the scorers without
    part in training. training: the number of the former.
    """

    def __init__(
        self,
        reward: Reward,
        independent: Sequence[Reward],
        pairs: Iterable[Pair],
        report: StageProgress,
    ) -> None:
        unique = list(dict.fromkeys(pairs))
        # Not every scorer accepts an empty text.
        texts = [Sample(s.request, text or ".", s.task) for s, text in unique]

        def progress(done: int, total: int) -> None:
            report("score", done, total, "")

        if isinstance(reward, Weighted):
            parts = reward.components(texts, progress)
            by_name = {reward.name: reward.combine(parts), **parts}
        else:
            by_name = {reward.name: reward.score(texts, progress)}
        self.training = len(by_name)
        by_name |= {s.name: s.score(texts) for s in independent if s.name not in by_name}
        self.names = list(by_name)
        self._known = {
            name: dict(zip(unique, scores, strict=True)) for name, scores in by_name.items()
        }

    def of(self, samples: Sequence[Sample], texts: Texts, name: str | None = None) -> Float64:
        known = self._known[name or self.names[0]]
        return np.array(
            [
                [np.nan if text is None else known[sample, text] for text in row]
                for sample, row in zip(samples, texts.rows, strict=True)
            ],
            float,
        )


@dataclass(frozen=True, slots=True)
class Other:
    """Texts of another model; kind: "baseline" or "answers"."""

    name: str
    kind: str
    texts: Texts


@dataclass(frozen=True, slots=True)
class Evidence:
    """written: name of a block of the grid, or "references" → texts."""

    grid: Grid
    written: Mapping[str, Texts]
    others: Sequence[Other]
    scores: Scores
    edges: Edges  # lower bounds of the levels of each task, in the training reward

    @property
    def samples(self) -> list[Sample]:
        return self.grid.samples

    @property
    def levels(self) -> int:
        """Number of levels; the block "levels" has one column more, for "any"."""
        return len(self.written["levels"].rows[0]) - 1

    @property
    def tasks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Task → mask of its samples."""
        names = np.array([sample.task for sample in self.samples])
        return {str(task): names == task for task in dict.fromkeys(names)}

    def score(self, texts: Texts, name: str | None = None) -> Float64:
        """[samples, commands], by the scorer of that name or the training reward."""
        return self.scores.of(self.samples, texts, name)

    def achieved_levels(self, texts: Texts) -> Float64:
        """[samples, commands], from the training reward."""
        rewards, words = self.score(texts), texts.words()
        return np.array(
            [
                [
                    self.edges[s.task].of(r, int(n)) if np.isfinite(r) else np.nan
                    for r, n in zip(row, counts, strict=True)
                ]
                for s, row, counts in zip(self.samples, rewards, words, strict=True)
            ],
            float,
        )
