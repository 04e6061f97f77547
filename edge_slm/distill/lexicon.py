"""The words that a model may use: those of the texts that it was trained on (`words.txt`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from edge_slm.distill.samples import Sample
from edge_slm_runtime.bundle import WORDS
from edge_slm_runtime.errors import DataError
from edge_slm_runtime.lexicon import LONGEST, read_lexicon, words_in

TEXTS = 2  # that have a word at least: most of those of a single one are slips
_MOST = 40_000
_LEAST = 2_000  # fewer words are no vocabulary: the texts of a test, or of another script


def lexicon_of(samples: Iterable[Sample], init: str = "") -> bytes:
    """The content of words.txt: the words of at least TEXTS responses or of the requests for
    them, the commonest where there are too many; b"" where there are too few.

    Requests and response of a text count as one: what is asked for is said again. init: a
    checkpoint that training goes on from, whose words stay. Raises DataError when its list of
    words is none.
    """
    counts: Counter[bytes] = Counter()
    for response, asked in groupby(sorted(samples, key=_response), _response):
        counts.update({*words_in(" ".join([response, *(one.request for one in asked)]))})
    found = {*[w for w, n in counts.most_common() if n >= TEXTS and len(w) <= LONGEST][:_MOST]}
    before = Path(init) / WORDS
    if init and before.is_file():
        try:
            found |= {*read_lexicon(before.read_bytes())}
        except ValueError as error:
            raise DataError(f"{before}: {error}", "remove it, or copy it again") from None
    return b"".join(word + b"\n" for word in sorted(found)) if len(found) >= _LEAST else b""


def _response(sample: Sample) -> str:
    return sample.response
