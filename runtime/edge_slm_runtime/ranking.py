"""Which of several answers to one request is best, and how they are drawn (`best_of`)."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace

from edge_slm_runtime.keywords import coverage, repeated_share
from edge_slm_runtime.records import Request

MOST = 64  # answers of a request
TEMPERATURE = 0.5  # of candidates, instead of 0
# Worth, in nats of the mean log-probability; found by reading 76 × 8 answers of prompts-115m.
_TORN, _REPEATED, _WRITING = 0.4, 1.5, 0.6
_CONFIDENCE, _LEAST = 4.0, 1e-6


def score(
    logprobs: Sequence[float],
    request: str,
    text: str,
    *,
    torn: bool = False,
    shows_text: bool = False,
    confidence: float | None = None,
) -> float:
    """How good an answer is; higher is better, and only answers to one request compare.

    The mean log-probability of its tokens (0 without any), plus the share of the request's
    content words that it has (`keywords.coverage`), less 1.5 × the share of its own content words
    that it says again, 0.4 when it is `torn` (cut within a sentence), and 0.6 for quotation
    marks that nobody asked for: the request has none, and the task does not show text. Where the
    model judges its answers, the logarithm of its confidence counts, too.
    """
    value = sum(logprobs) / len(logprobs) if logprobs else 0.0
    value += coverage(request, text) - _REPEATED * repeated_share(request, text)
    if torn:
        value -= _TORN
    if not shows_text and '"' in text and '"' not in request:
        value -= _WRITING
    if confidence is not None:
        value += _CONFIDENCE * math.log(max(confidence, _LEAST))
    return value


def candidates(request: Request) -> list[Request]:
    """The answers that the best is chosen from, with seeds from the request's on.

    At temperature 0 the first is the greedy one, and the seeds begin at 0 where none is given,
    so that the choice is reproducible, too. Raises BadSetting.
    """
    sampling = request.sampling
    alone = replace(request, best_of=1, logprobs=True)
    drawn = range(request.best_of)
    greedy = []
    seed = sampling.seed
    if sampling.greedy:
        greedy, drawn = [replace(alone, seed=None)], drawn[1:]
        alone, seed = replace(alone, temperature=TEMPERATURE), seed or 0
    if seed is None:
        seed = secrets.randbits(53)
    return [*greedy, *(replace(alone, seed=(seed + offset) % 2**64) for offset in drawn)]
