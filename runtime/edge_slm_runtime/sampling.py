"""Choosing the next token from logits, in numpy.

Order and meaning follow transformers' LogitsProcessors: repetition penalty,
n-gram block, temperature, top-k, top-p, then one draw. One difference: the n-gram
block looks at the answer alone, so that the words of a request may always come.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_slm_runtime.command import is_count
from edge_slm_runtime.errors import BadSetting, EngineError, shown

Logits = NDArray[np.float32]
Refusal = Callable[[int], bool]  # of a token

# Small models fall into loops when they are greedy; a repeat of this many tokens
# (three to four words) is hardly ever meant in a text of at most 160 words.
NO_REPEAT_NGRAM_SIZE = 5
_BLOCK = 128  # tokens
_MARGIN = 4.0  # of logits: a token is about as likely as one of up to 55 times its chance
_INT_MAX = 2**31 - 1  # the engines count in int32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Raises BadSetting for a value out of range.

    temperature: 0 is greedy; else logits are divided by it (numbers overflow far
    below 0.01). top_k: keep the k most likely (0: all). top_p: keep the smallest
    set of at least this probability (nucleus sampling, arXiv 1904.09751).
    repetition_penalty: logits of tokens already in prompt or answer are divided
    (positive) or multiplied (negative) by it (CTRL, arXiv 1909.05858).
    no_repeat_ngram_size: no run of this many tokens comes twice in an answer (0:
    off). seed: the same seed gives the same answer; None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = NO_REPEAT_NGRAM_SIZE
    seed: int | None = None

    def __post_init__(self) -> None:
        heat = _number(self.temperature)
        _in_range(
            "temperature", self.temperature, heat == 0 or 0.01 <= heat <= 100, "0, 0.01 … 100"
        )
        _in_range("top_p", self.top_p, 1e-6 <= _number(self.top_p) <= 1, "1e-6 … 1")
        penalty = _number(self.repetition_penalty)
        _in_range(
            "repetition_penalty", self.repetition_penalty, 0.01 <= penalty <= 100, "0.01 … 100"
        )
        for name in ("top_k", "no_repeat_ngram_size"):
            count = getattr(self, name)
            _in_range(name, count, is_count(count) and count <= _INT_MAX, "0 … 2**31 - 1, whole")
        seed_ok = self.seed is None or (is_count(self.seed) and self.seed < 1 << 64)
        _in_range("seed", self.seed, seed_ok, "0 … 2**64 - 1, whole")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Sampler:
    """Draws the tokens of one answer. `seed` reproduces it (None when greedy)."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self.seed: int | None = None
        self._random: np.random.Generator | None = None  # greedy answers import no numpy.random
        if not sampling.greedy:
            # 53 bits survive a trip through JSON numbers.
            self.seed = secrets.randbits(53) if sampling.seed is None else sampling.seed
            self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._prompt = prompt
        self._seen = set(prompt)
        self._answer: list[int] = []
        self._after: dict[
            tuple[int, ...], list[int]
        ] = {}  # n - 1 tokens → the tokens that followed

    def pick(
        self,
        logits: Logits,
        refused: Refusal | None = None,
        avoided: Refusal | None = None,
        otherwise: Callable[[], int] | None = None,
    ) -> int:
        """The next token of `logits` [V] that is not refused, and not `avoided` as long as
        another one is left; masked entries are -inf. Changes `logits`.

        otherwise: gives the token where all that are about as likely as the likeliest one are
        to be avoided. Raises EngineError when they are not finite.
        """
        if self._sampling.repetition_penalty != 1:
            penalise(logits, self._seen, self._sampling.repetition_penalty)
        if self._after and (banned := self._after.get(self._last())):
            logits[banned] = -np.inf
        return self.draw(logits, refused, avoided, otherwise)

    def draw(
        self,
        logits: Logits,
        refused: Refusal | None = None,
        avoided: Refusal | None = None,
        otherwise: Callable[[], int] | None = None,
    ) -> int:
        """`pick`, of logits that it has changed before."""
        spare = None  # the logits before any was avoided
        while True:
            best = int(logits.argmax())  # of what is not a number, if there is any
            if spare is not None and logits[best] == -np.inf:
                logits[:], spare, avoided = spare, None, None
                continue
            if not math.isfinite(logits[best]):
                raise not_finite()
            if self._random is None:
                token = best
            else:
                token = drawn(probabilities(logits, self._sampling), self._random.random())
            if refused is not None and refused(token):
                logits[token] = -np.inf
                if spare is not None:
                    spare[token] = -np.inf
            elif avoided is not None and avoided(token):
                # With it those about as likely as the best: the next one may be far down.
                spare = logits.copy() if spare is None else spare
                least = logits[best] - _MARGIN
                likely = np.flatnonzero(logits > least).tolist()
                logits[[token, *filter(avoided, likely)]] = -np.inf
                if otherwise is not None and logits.max() <= least:
                    return otherwise()
            else:
                self.note(token)
                return token

    def take_back(self) -> None:
        """Forgets the last token, but not the random numbers that it took."""
        token = self._answer.pop()
        if token not in self._answer and token not in self._prompt:
            self._seen.discard(token)
        if following := self._after.get(self._last()):
            following.pop()

    def note(self, token: int) -> None:
        """The next token, chosen by somebody else."""
        size = self._sampling.no_repeat_ngram_size
        if size and len(last := self._last()) == size - 1:
            self._after.setdefault(last, []).append(token)
        self._seen.add(token)
        self._answer.append(token)

    def _last(self) -> tuple[int, ...]:
        """The n - 1 tokens that decide which the n-gram block forbids."""
        size = self._sampling.no_repeat_ngram_size
        return tuple(self._answer[len(self._answer) - size + 1 :]) if size else ()


def not_finite() -> EngineError:
    """What is wrong with a model whose predictions are not numbers, or too large ones."""
    return EngineError(
        "the model's predictions are not finite numbers", "verify the bundle, or convert it again"
    )


def penalise(logits: Logits, seen: set[int], penalty: float) -> None:
    """The CTRL repetition penalty, in place. What is masked stays masked."""
    ids = [token for token in seen if token < logits.size and logits[token] > -np.inf]
    scores = logits[ids]
    logits[ids] = np.where(scores > 0, scores / penalty, scores * penalty)


def probabilities(logits: Logits, sampling: Sampling) -> NDArray[np.float64]:
    """What tokens [V] are drawn with, after temperature, top-k and top-p."""
    if not 0 < sampling.top_k < logits.size:
        return _nucleus(logits, sampling)
    # Negated: numpy is 30 times slower when the many equal ones, -inf, are not the largest.
    least = -np.partition(-logits, sampling.top_k - 1)[sampling.top_k - 1]
    kept = np.flatnonzero(logits >= least)
    chances = np.zeros(logits.size)
    chances[kept] = _nucleus(logits[kept], sampling)
    return chances


def _nucleus(logits: Logits, sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities [V] after temperature and top-p."""
    chances = logits.astype(np.float64)
    chances /= sampling.temperature  # in place: new arrays of this size cost more than the sums
    chances -= chances.max()
    np.exp(chances, out=chances)
    chances /= chances.sum()
    if sampling.top_p < 1:
        tail = 1 - sampling.top_p
        # Those that are less than the tail all together need no sorting.
        rising = np.sort(chances[chances > tail / chances.size])
        below = tail - (1 - rising.sum())
        first = np.searchsorted(np.cumsum(rising), below, side="right")
        # The most likely token always stays, and so do those as likely as the last that does.
        chances *= chances >= rising[min(first, rising.size - 1)]
        chances /= chances.sum()
    return chances


def drawn(chances: NDArray[np.float64], point: float) -> int:
    """The token at `point`, 0 … 1, of the `chances` [V] laid end to end.

    First its block, then its place there: adding all chances up one by one would take
    longer than all the rest.
    """
    steps = np.cumsum(np.add.reduceat(chances, np.arange(0, chances.size, _BLOCK)))
    point = min(point * steps[-1], np.nextafter(steps[-1], 0))
    block = int(np.searchsorted(steps, point, side="right"))
    piece = chances[block * _BLOCK : (block + 1) * _BLOCK]
    before = steps[block - 1] if block else 0.0
    place = np.searchsorted(np.cumsum(piece), point - before, side="right")
    return block * _BLOCK + int(min(place, np.flatnonzero(piece)[-1]))  # sums may round apart


def log_probability(logits: Logits, tokens: Sequence[int]) -> float:
    """Natural log of the softmax of `logits` [V] at the likeliest of `tokens`."""
    top = float(logits.max())
    return (
        float(max(logits[token] for token in tokens))
        - top
        - math.log(float(np.exp(logits - top).sum()))
    )


def _number(value: object) -> float:
    """`value` as float; NaN (outside every range) when it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _in_range(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise BadSetting(f"{name} is {shown(value)}", f"allowed: {allowed}")
