"""Records as token ids, packed into rows of fixed length with exact boundaries.

Several records share a row; each has its own positions from 0, attends only to
itself, and only its response (with `<|end|>`) bears loss. A packed row gives the
same logits as its records alone (tests/distill/test_packing.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm.distill.hindsight import Record, drop
from edge_slm_runtime.command import END, CommandSchema

IGNORED = -100  # PyTorch's cross-entropy skips this label
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One record: request and response ids; the command is rendered per epoch (dropout)."""

    request: list[int]
    response: list[int]  # END included
    record: Record


def encode_records(
    records: Sequence[Record], tokenizer: Any, schema: CommandSchema, positions: int
) -> tuple[list[Encoded], int]:
    """(records that fit into `positions` tokens, how many did not fit)."""
    tokenizer.encode_special_tokens = True  # control tokens in data are plain text
    end = tokenizer.token_to_id(END)
    requests = tokenizer.encode_batch([r.request for r in records], add_special_tokens=False)
    responses = tokenizer.encode_batch([r.response for r in records], add_special_tokens=False)
    overhead = len(schema.axes) + 2
    encoded = [
        Encoded(q.ids, [*a.ids, end], record)
        for q, a, record in zip(requests, responses, records, strict=True)
    ]
    fitting = [e for e in encoded if overhead + len(e.request) + len(e.response) <= positions]
    return fitting, len(encoded) - len(fitting)


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays [rows, length]. `segment` numbers the records of a row; -1 is padding."""

    ids: Ids
    positions: Ids
    labels: Ids  # already shifted: labels[t] is the token after ids[t], or IGNORED
    segment: Ids

    def mask(self) -> npt.NDArray[np.bool_]:
        """Attention [rows, 1, length, length]: causal, within a record. True = attend."""
        length = self.ids.shape[1]
        same = self.segment[:, :, None] == self.segment[:, None, :]
        return np.asarray((same & np.tri(length, dtype=bool))[:, None])


class Packer:
    """Deterministic batches: (seed, epoch, batch number) says exactly what is in one."""

    def __init__(
        self,
        records: Sequence[Encoded],
        schema: CommandSchema,
        *,
        rows: int,
        length: int,
        dropout: float,
        seed: int,
    ) -> None:
        self._records, self._schema = records, schema
        self._rows, self._length, self._dropout, self._seed = rows, length, dropout, seed

    def epoch(self, number: int, *, partial: bool = False) -> list[list[list[int]]]:
        """The plan of an epoch: batches of rows of record indices.

        First-fit over a small window of open rows: about 97% of the positions are used.
        partial: the last batch may have fewer rows, so that no record is left out.
        """
        order = list(range(len(self._records)))
        random.Random(f"{self._seed}/{number}").shuffle(order)
        overhead = len(self._schema.axes) + 2
        open_rows: list[tuple[int, list[int]]] = []
        full: list[list[int]] = []
        for index in order:
            record = self._records[index]
            size = overhead + len(record.request) + len(record.response)
            for i, (left, row) in enumerate(open_rows):
                if size <= left:
                    row.append(index)
                    open_rows[i] = (left - size, row)
                    break
            else:
                open_rows.append((self._length - size, [index]))
                if len(open_rows) > 64:
                    tightest = min(range(len(open_rows)), key=lambda i: open_rows[i][0])
                    full.append(open_rows.pop(tightest)[1])
        full += [row for _, row in open_rows]
        random.Random(f"{self._seed}/{number}/rows").shuffle(full)
        end = len(full) if partial else len(full) - self._rows + 1
        return [full[i : i + self._rows] for i in range(0, end, self._rows)]

    def batch(self, epoch: int, number: int, rows: list[list[int]]) -> Batch:
        """Arrays of one batch of the plan; command dropout is drawn from its number."""
        rng = random.Random(f"{self._seed}/{epoch}/{number}/dropout")
        shape = (len(rows), self._length)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels, segment = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
        for r, row in enumerate(rows):
            at = 0
            for s, index in enumerate(row):
                record = self._records[index]
                command = drop(record.record.command, self._dropout, rng)
                prompt = self._schema.frame(record.request, command)
                tokens = prompt + record.response
                stop = at + len(tokens)
                ids[r, at:stop] = tokens
                positions[r, at:stop] = np.arange(len(tokens))
                segment[r, at:stop] = s
                # The last prompt token predicts the first response token.
                labels[r, at + len(prompt) - 1 : stop - 1] = record.response
                at = stop
        return Batch(ids, positions, labels, segment)
