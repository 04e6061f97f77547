"""Guesses of the next tokens, from the tokens that followed the same tokens before.

The answer of speculative decoding: a guess costs some microseconds and is checked by the
model, so it may be wrong and is never harmful (Leviathan et al., arXiv 2211.17192; answers
from n-grams as in prompt look-up decoding). A small table learns from the prompts and answers of
the process; it is bounded, and forgets what was not confirmed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

ORDER = 3  # tokens that are looked at, at most
_SLOTS = 1 << 15
_MOST_VOTES, _TELLING_VOTES = 8, 3
# A guess is worth its cost when it is right this often: an additional token costs 0.1 to 0.3
# of a step. Rates begin below it, so that only proven n-grams are used.
_WORTH, _FIRST_RATE = 0.35, 0.2
_RATE_STEP = 1 / 64  # weight of the newest outcome


class _Entry(NamedTuple):
    token: int
    order: int
    votes: int


class NGrams:
    """For each of the last 1 … ORDER tokens, the token that followed most; by majority vote.

    May be used from several threads: a lost update is a worse guess, no more.
    """

    def __init__(self) -> None:
        self._keys = array("q", bytes(8 * _SLOTS))
        self._tokens = array("i", bytes(4 * _SLOTS))
        self._votes = array("b", bytes(_SLOTS))
        # How often an entry of an order and number of votes was right.
        self._rates = [[_FIRST_RATE] * (_TELLING_VOTES + 1) for _ in range(ORDER + 1)]

    def learn(self, before: Sequence[int], token: int) -> None:
        """`token` followed `before`, of which the last ORDER are looked at."""
        if entry := self._find(before):
            rates = self._rates[entry.order]
            rates[entry.votes] += _RATE_STEP * ((entry.token == token) - rates[entry.votes])
        for order in range(1, min(ORDER, len(before)) + 1):
            key = hash(tuple(before[-order:]))
            slot, votes = key % _SLOTS, self._votes[key % _SLOTS]
            if votes and (self._keys[slot], self._tokens[slot]) == (key, token):
                self._votes[slot] = min(votes + 1, _MOST_VOTES)
            elif votes > 1:
                self._votes[slot] = votes - 1
            else:
                self._keys[slot], self._tokens[slot], self._votes[slot] = key, token, 1

    def learn_all(self, ids: Sequence[int]) -> None:
        for i in range(1, len(ids)):
            self.learn(ids[max(0, i - ORDER) : i], ids[i])

    def guess(self, before: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that are likely to follow `before`, perhaps none."""
        guessed: list[int] = []
        context, chance = list(before[-ORDER:]), 1.0
        while len(guessed) < most and (entry := self._find(context)):
            chance *= self._rates[entry.order][entry.votes]
            if chance < _WORTH:
                break
            guessed.append(entry.token)
            context = [*context, entry.token][-ORDER:]
        return guessed

    def _find(self, before: Sequence[int]) -> _Entry | None:
        """The entry of the longest known context."""
        for order in range(min(ORDER, len(before)), 0, -1):
            key = hash(tuple(before[-order:]))
            slot = key % _SLOTS
            if self._votes[slot] and self._keys[slot] == key:
                return _Entry(self._tokens[slot], order, min(self._votes[slot], _TELLING_VOTES))
        return None
