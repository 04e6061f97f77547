"""Answers of a checkpoint by our own engines: int8, in batches, many times as fast as torch."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from edge_slm.distill.generate import Episode, Outcome
from edge_slm.progress import Progress
from edge_slm_converters.checkpoint import read_checkpoint
from edge_slm_converters.quantise import PRECISIONS
from edge_slm_converters.variants import Model, open_variant, write_variant
from edge_slm_runtime import Request
from edge_slm_runtime.engines import engine_class

_ROWS = 32


class EngineGenerator:
    """Generates the answers of the checkpoint folder `checkpoint`, quantised to int8.

    Its variant is written to a temporary folder, without a gate. Raises CheckpointError,
    DependencyMissing.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        source = read_checkpoint(checkpoint)
        name = "numba-int8" if engine_class("numba").installed() else "onnx-int8"
        folder = Path(tempfile.mkdtemp(prefix="edge-slm-explore-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._slm = open_variant(
            folder, source, write_variant(name, Model(source, PRECISIONS["int8"]), folder)
        )

    def __call__(
        self,
        episodes: Sequence[Episode],
        *,
        temperature: float = 1.0,
        progress: Progress | None = None,
    ) -> list[Outcome]:
        """One answer per episode, in order."""
        requests = (
            Request(
                episode.request,
                episode.command.task,
                episode.command.words,
                episode.command.relevance,
                temperature=temperature,
                seed=episode.seed,
                no_repeat_ngram_size=0,
                no_repeat_words=False,
                keep_length=False,
                syntax="none",
            )
            for episode in episodes
        )
        outcomes = []
        for answer in self._slm.generate_batch(requests, _ROWS):
            outcomes.append(Outcome(answer.text, answer.finish_reason == "stop"))
            if progress:
                progress(len(outcomes), len(episodes))
        return outcomes
