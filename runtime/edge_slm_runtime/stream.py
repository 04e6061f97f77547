"""An answer that its reader drives: each piece is computed when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_slm_runtime.answer import Answer, Step
from edge_slm_runtime.bound import Bound
from edge_slm_runtime.closable import Closable
from edge_slm_runtime.records import Generation

if TYPE_CHECKING:
    from edge_slm_runtime.generate import SLM


class Stream(Bound, Iterator[str]):
    """Yields text as it becomes sure; `result` is the Generation afterwards, of a stream that
    was left before its end with the text until then.

    The pieces joined are exactly `result.text`. A stream has one reader at a time: `next` raises
    EngineError while another thread is in it. `cancel` may be called from anywhere.
    """

    def __init__(self, slm: SLM, answer: Answer, steps: Closable[Step]) -> None:
        self._slm = slm
        self._answer = answer
        self._steps = steps
        self._given = 0  # characters
        self._begun = False
        self._result: Generation | None = None

    def __next__(self) -> str:
        self._begun = True
        for step in self._steps:
            self._given += len(step.text)
            if step.done:
                self._result = self._slm._result_of(step.answer)
            if step.text:
                return step.text
        raise StopIteration

    @property
    def result(self) -> Generation:
        """The answer and its metadata; of a stream that was not read to its end the text that it
        gave, with the finish reason `cancelled`. Raises RuntimeError before it is read."""
        if not self._begun:
            raise RuntimeError("the stream has a result once it was read, or cancelled")
        return self._result or self._slm._result_of(self._answer, self._given)

    def cancel(self) -> None:
        """Ends the answer with the pass of the model that is under way: a thread that is reading
        it comes to its end."""
        self._begun = self._answer.cancelled = True
        self._steps.close()

    def close(self) -> None:
        """As `cancel`."""
        self.cancel()
