"""Several distinct answers of one request, the best first."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_slm_runtime.command import is_count
from edge_slm_runtime.errors import BadSetting, shown
from edge_slm_runtime.ranking import MOST
from edge_slm_runtime.records import Generation, Request

if TYPE_CHECKING:
    from edge_slm_runtime.generate import SLM

TEMPERATURE = 0.8  # instead of 0, at which all answers are the same
_ROUNDS = 3  # of drawing in the place of answers that came before


def variations(slm: SLM, request: Request, n: int, rows: int) -> list[Generation]:
    """Up to `n` answers with distinct texts by falling `score`, the best of `best_of` where that
    is more, `rows` at a time.

    They have the seeds from the request's on. Raises BadSetting, and as `SLM.generate`.
    """
    if not is_count(n) or not 1 <= n <= MOST:
        raise BadSetting(f"n is {shown(n)}", f"allowed: 1 … {MOST}, whole")
    if n == 1:
        return [slm.generate(replace(request, logprobs=True))]
    slm.check(request)
    asked, drawn = replace(request, logprobs=True, best_of=1), max(n, request.best_of)
    warnings: tuple[str, ...] = ()
    if asked.temperature == 0:
        asked = replace(asked, temperature=TEMPERATURE)
        warnings = (f"temperature 0 has one answer; {drawn} were drawn at {TEMPERATURE}",)
    first = seed = secrets.randbits(53) if asked.seed is None else asked.seed
    slm.check(replace(asked, seed=seed))
    found: dict[str, Generation] = {}
    for _ in range(_ROUNDS):
        seeds = range(seed, seed + drawn - len(found))
        seed = seeds.stop
        tries = [replace(asked, seed=one % 2**64) for one in seeds]
        for answer in slm.generate_batch(tries, min(rows, len(tries))) if tries else ():
            found.setdefault(answer.text, answer)
    if len(found) < n:
        warnings += (f"{len(found)} of {seed - first} answers drawn were distinct",)
    ranked = sorted(found.values(), key=lambda one: one.score or 0.0, reverse=True)
    return [replace(one, warnings=(*one.warnings, *warnings)) for one in ranked[:n]]
