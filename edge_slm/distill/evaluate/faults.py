"""Faults of a text that its reader sees at once, and what of its request it keeps verbatim.

Each figure is the share of the texts that have the fault; lower is better, except for `quoted`
and `keywords`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from edge_slm.distill.samples import Sample
from edge_slm_bench.metrics.quality import bootstrap_mean
from edge_slm_runtime.errors import DependencyMissing
from edge_slm_runtime.keeps import QUOTED, texts_to_show
from edge_slm_runtime.keywords import coverage, words_of

_ENDS = re.compile(r"[.!?…][\"'”’)\]]*$")
_COMMON = 1e-6  # frequency that each part of a compound has at least
_TASKS_OF_LISTS = ("tags", "title")  # which need no sentence


def invented(request: str, text: str) -> bool:
    """Whether a word of the text is in no word list and not in the request.

    Quoted text is not judged: names and made-up words belong there.
    """
    asked = set(words_of(request))
    prose = QUOTED.sub(" ", text)
    unknown = (word for word in words_of(prose) if word.isascii() and word.isalpha())
    return any(word not in asked and not _is_word(word) for word in unknown)


def repeats(text: str) -> bool:
    """Whether a run of three words comes twice."""
    words = words_of(text)
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) < len(runs)


def unfinished(text: str) -> bool:
    """Whether the last sentence has no end."""
    return not _ENDS.search(text.strip())


def quoted(request: str, text: str) -> bool:
    """Whether the text has the words that it is to show, verbatim.

    They are the quotations of the request, or the request itself.
    """
    return all(words.lower() in text.lower() for words in texts_to_show(request))


def faults(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, Any]:
    """Shares with their intervals, JSON-ready; without those that no sample is judged by."""
    pairs = list(zip(samples, texts, strict=True))
    judged: dict[str, tuple[Callable[[Sample, str], float], Callable[[Sample], bool]]] = {
        "invented": (lambda s, t: invented(s.request, t), lambda s: True),
        "repeats": (lambda s, t: repeats(t), lambda s: s.task not in _TASKS_OF_LISTS),
        "unfinished": (lambda s, t: unfinished(t), lambda s: s.task not in _TASKS_OF_LISTS),
        "quoted": (lambda s, t: quoted(s.request, t), lambda s: s.task == "lettering"),
        "keywords": (lambda s, t: coverage(s.request, t), lambda s: s.task == "scene"),
    }
    figures = {}
    for name, (judge, applies) in judged.items():
        values = [float(judge(sample, text)) for sample, text in pairs if applies(sample)]
        if values:
            figures[name] = bootstrap_mean(np.array(values)).as_dict()
    return figures


@cache
def _frequencies() -> Mapping[str, float]:
    """Word → its share of all words: English as it is written, names and loan words too."""
    try:
        from wordfreq import get_frequency_dict
    except ImportError:
        raise DependencyMissing(
            "finding invented words needs wordfreq", "pip install 'edge-slm[train]'"
        ) from None
    words: Mapping[str, float] = get_frequency_dict("en", wordlist="large")
    return words


@cache
def _is_word(word: str) -> bool:
    """In the list, or an inflection of a word that is, or a compound of two that are common."""
    known = _frequencies()
    stems = [word, word.removesuffix("s"), word.removesuffix("ly"), word.removesuffix("ness")]
    return len(word) < 3 or any(stem in known for stem in stems) or _is_compound(word)


def _is_compound(word: str) -> bool:
    known = _frequencies()
    cuts = range(4, len(word) - 3)
    return any(min(known.get(word[:i], 0), known.get(word[i:], 0)) >= _COMMON for i in cuts)
