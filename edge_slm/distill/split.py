"""Which rows of the data are used, and which requests are held out of training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_slm_runtime.command import WORD_EDGES

HOLDOUT_PERCENT = 4  # a recipe may say otherwise


@dataclass(frozen=True, slots=True)
class Reading:
    """How a recipe reads its data; those that evaluate a model read it in the same way.

    holdout_percent, dev_percent: of requests. leave_out: beginnings of the "source" of rows
    that are not used. longest: words; a longer response is cut where it is whole. sentences:
    tasks whose responses end in a full stop. whole: without requests that are a mere opening
    of their response, and without responses with an open quotation mark.
    """

    holdout_percent: int = HOLDOUT_PERCENT
    dev_percent: int = 0
    leave_out: tuple[str, ...] = ()
    longest: int = WORD_EDGES[-1] - 1
    sentences: tuple[str, ...] = ()
    whole: bool = False

    @property
    def held_percent(self) -> int:
        """Of requests that are not trained on."""
        return self.holdout_percent + self.dev_percent

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Reading:
        """From the [data] of a recipe as JSON; older ones lack some settings."""
        return cls(
            data["holdout_percent"],
            data.get("dev_percent", 0),
            tuple(data.get("leave_out", ())),
            data.get("max_response_words", WORD_EDGES[-1] - 1),
            tuple(data.get("sentences", ())),
            data.get("whole", False),
        )


EVERYTHING = Reading()


def held_out(request: str, percent: int) -> bool:
    """By a hash of the folded request: the split does not depend on the data."""
    folded = " ".join(request.lower().split())
    return int.from_bytes(hashlib.sha256(folded.encode()).digest()[:4], "big") % 100 < percent
