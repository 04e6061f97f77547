"""The longest answer that fits a deadline, by what this device does now."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from itertools import pairwise
from math import floor
from statistics import median
from typing import TYPE_CHECKING, Any

from edge_slm_runtime.description import task_lengths
from edge_slm_runtime.errors import BadSetting, EngineError
from edge_slm_runtime.planning import answer_tokens
from edge_slm_runtime.records import Request

if TYPE_CHECKING:
    from edge_slm_runtime.generate import SLM

_RUNS, _TOKENS = 3, 12  # of the measurement


@dataclass(frozen=True, slots=True)
class Fit:
    """words: the most to ask for, None where not even the fewest fit. tokens: of the answer.
    ttft_ms, tpot_ms: by which that is so; measured: how."""

    words: int | None
    tokens: int
    ttft_ms: float
    tpot_ms: float
    measured: str


def fit(slm: SLM, request: Request) -> Fit:
    """Measures `request` on `slm`: a few short answers to it, their prompts computed afresh.

    The slowest first token and the median of the later ones count. Raises BadSetting without a
    deadline, and as `SLM.generate`.
    """
    plan = slm.check(request)
    if plan.deadline_ms is None:
        raise BadSetting("deadline_ms is missing", "give the time that the answer may take")
    low, high = _lengths(slm, request.task)
    room = slm.manifest.model.positions - len(plan.prompt)
    free: dict[str, Any] = {"deadline_ms": None, "stop": (), "keep": (), "choices": ()}
    probe = replace(request, words=high, max_new_tokens=min(_TOKENS, room), **free)
    first: list[float] = []
    later: list[float] = []
    for _ in range(_RUNS):
        seconds = slm.trace(probe, cache_key=secrets.token_hex(8)).seconds
        first.append(seconds[0])
        later += [after - before for before, after in pairwise(seconds)]
    if not later:
        raise EngineError("the model ends after a token: there is nothing to measure")
    step = median(later)
    tokens = min(room, floor((plan.deadline_ms / 1e3 - max(first)) / step) + 1)
    fitting = [n for n in range(low, high + 1) if answer_tokens(n) <= tokens]
    return Fit(
        words=max(fitting, default=None),
        tokens=max(0, tokens),
        ttft_ms=max(first) * 1e3,
        tpot_ms=step * 1e3,
        measured=f"{_RUNS} answers of up to {_TOKENS} tokens, just now; {slm!r}",
    )


def _lengths(slm: SLM, task: str | None) -> tuple[int, int]:
    """The fewest and the most words that may be asked for."""
    if not (schema := slm.manifest.prompt.schema):
        return 1, slm.manifest.model.positions
    axis = schema.axis("words")
    return task_lengths(schema).get(task or "", (axis.edges[0], axis.edges[-1] - 1))
