"""The split: the requests that are held out of training."""

from __future__ import annotations

import hashlib

HOLDOUT_PERCENT = 4  # a recipe may say otherwise


def held_out(request: str, percent: int) -> bool:
    """By a hash of the folded request: the split does not depend on the data."""
    folded = " ".join(request.lower().split())
    return int.from_bytes(hashlib.sha256(folded.encode()).digest()[:4], "big") % 100 < percent
