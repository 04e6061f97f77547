"""The probability, by the model itself, that its answer has the highest level of relevance. Models
that were trained for it (`CommandSchema.confidence`) predict the level after `<|end|>`."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_slm_runtime.answer import Answer, Step
from edge_slm_runtime.plan import FinishReason, Plan
from edge_slm_runtime.sampling import Logits
from edge_slm_runtime.text import Detokenizer, TextCodec


class JudgedAnswer(Answer):
    """An answer after which the engine computes a little more: text that the decoder added (a full
    stop), and the end token. The logits after it give the confidence."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._following: list[int] | None = None  # tokens still to compute; None: not ended yet
        self._ended: tuple[list[int], FinishReason | None, Step] = [], None, Step(self, "", True)

    def choose(self, logits: Logits) -> int:
        if self._following is None:
            return super().choose(logits)
        if self._following:
            return self._following.pop(0)
        of_levels = logits[[*self.plan.levels]].astype(np.float64)
        chances = np.exp(of_levels - of_levels.max())
        self.confidence = float(chances[-1] / chances.sum())
        return self.ends[0]

    def accept(self, token: int) -> Step:
        if self._following is None:
            step = super().accept(token)
            return self._go_on(step) if step.done and not self.called_off else step
        if self.confidence is None:
            self.ids.append(token)
            return Step(self, "", done=False)
        return self.end()

    def end(self) -> Step:
        if self._following is None:
            return super().end()
        self.ids, self.finish, step = self._ended
        return step

    def _go_on(self, step: Step) -> Step:
        """Keeps the tokens that are in the final text, and computes the rest of it after them."""
        self._ended = self.ids, self.finish, step
        kept, text, read = 0, "", Detokenizer(self._codec)
        for count, token in enumerate(self.ids, 1):
            piece = read.push(token)
            longer = text + (piece if text else piece.lstrip())
            if not self.text.startswith(longer):
                break
            kept, text = count, longer
        rest = self._codec.encode(self.text[len(text) :]) if text != self.text else []
        room = len(self.ids) - kept + 1  # as many tokens as were dropped, and a full stop
        first, *self._following = [*rest[:room], self.ends[0]]
        self.ids, self.finish = [*self.ids[:kept], first], None
        return Step(self, "", done=False)


def answer_to(plan: Plan, codec: TextCodec, started: float) -> Answer:
    """The answer to be decoded for a plan; started: see `Answer`."""
    return (JudgedAnswer if plan.levels else Answer)(plan, codec, started)
