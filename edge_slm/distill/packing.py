"""Records as token ids, packed into rows of fixed length with exact boundaries.

Several records share a row. Each has its own positions from 0 and attends only to itself,
and only its response (with `<|end|>`) has labels. A packed row gives the same logits as its
records alone (tests/distill/test_packing.py).
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm.distill.cuts import sentence_ends
from edge_slm.distill.hindsight import Record, drop
from edge_slm.distill.soft_labels import SoftLabels
from edge_slm_runtime.command import END, Command, CommandSchema

IGNORED = -100  # PyTorch's cross-entropy skips this label
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One record; its command is rendered anew in each epoch, with dropout.

    record None: a piece of general text, which has no command and follows `<|end|>`.
    """

    request: list[int]
    response: list[int]  # a record's with END
    record: Record | None
    begun: list[int]  # per response token: words begun before it; empty for general text
    sentences: tuple[int, ...] = ()  # tokens up to the end of each sentence, without END
    fault: int | None = None  # index of the first sentence that is not good; None: unknown

    def prompt(self, schema: CommandSchema, command: Command | None = None) -> list[int]:
        """Token ids before the response, with another command than the record's own."""
        if self.record is None:
            return [0]  # END
        return schema.frame(self.request, command or self.record.command)

    def judged(self, is_best: int) -> dict[int, int]:
        """Tokens up to the end of a sentence (but the last) → 1 if the response is good up to
        there, 0 if this sentence is at fault. Sentences of which neither is known are left out."""
        first_fault = len(self.sentences) if is_best else -1 if self.fault is None else self.fault
        return {
            end: int(k < first_fault)
            for k, end in enumerate(self.sentences[:-1])
            if k <= first_fault
        }

    def compared(self, alike: int) -> slice:
        """Indices of the response's tokens that are compared with those of another response, the
        first `alike` of which are the same: the sentence at fault where that is known and not
        among them, else all the others."""
        first, last = alike, len(self.response)
        if self.fault is not None:
            begin, end = (0, *self.sentences)[self.fault : self.fault + 2]
            if alike < end:
                first, last = max(alike, begin), end
        return slice(first, last)


def encode_records(
    records: Sequence[Record], tokenizer: Any, schema: CommandSchema, positions: int
) -> tuple[list[Encoded], int]:
    """(records that fit into `positions` tokens, how many did not fit)."""
    tokenizer.encode_special_tokens = True  # control tokens in data are plain text
    end = tokenizer.token_to_id(END)
    spelt = [" " * schema.spaced + schema.recased(r.request, r.command.task) for r in records]
    requests = tokenizer.encode_batch(spelt, add_special_tokens=False)
    responses = tokenizer.encode_batch([r.response for r in records], add_special_tokens=False)
    encoded = [
        Encoded(
            q.ids, [*a.ids, end], record, _words_begun(a.tokens), *_sentences(record, a.offsets)
        )
        for q, a, record in zip(requests, responses, records, strict=True)
    ]
    room = positions - schema.overhead
    fitting = [e for e in encoded if len(e.request) + len(e.response) <= room]
    return fitting, len(encoded) - len(fitting)


def _words_begun(tokens: Sequence[str]) -> list[int]:
    """Words begun before each token, and in all. A leading space (Ġ) or the start begins one."""
    counts = [0]
    for i, token in enumerate(tokens):
        counts.append(counts[-1] + (i == 0 or token.startswith("Ġ")))
    return counts


def _sentences(
    record: Record, offsets: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], int | None]:
    """`Encoded.sentences` and `.fault` of a record; offsets: characters of each token."""
    ends = sentence_ends(record.response)
    starts = [start for start, _ in offsets]
    at = record.response.find(record.fault) if record.fault else -1
    tokens = tuple(bisect_left(starts, end) for end in ends)
    return tokens, bisect_right(ends, at) if at >= 0 else None


def encode_text(text: str, tokenizer: Any, positions: int) -> list[Encoded]:
    """General text in pieces that fill a row each."""
    tokenizer.encode_special_tokens = True
    paragraphs = text.split("\n\n")
    stream = [i for e in tokenizer.encode_batch(paragraphs) for i in e.ids]
    size = positions - 1
    return [Encoded([], stream[i : i + size], None, []) for i in range(0, len(stream), size)]


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays [rows, length]. segment: number of the record in its row; -1 is padding.

    so_far, remaining: words of the response begun before the labelled token, and from it on;
    IGNORED where unknown (`remaining`: where the command has no length). achieved: at `<|end|>`,
    whether the response has the highest level (0, 1), where its command does not tell; and there at
    the end of each sentence, whether it is good up to there, as far as that is known. preferred:
    of the n-th pair of a row, n at the labels of the response that has the highest level, from
    where the two part, and at its end; -n at the end of the one that has not, and at its labels,
    which are not to be imitated: those of its sentence at fault, if that is known, or all from
    where they part; 0 elsewhere. soft_ids, soft_log_p [rows, length, k]: the teacher's likeliest
    tokens at each label and their log probabilities; k is 0 without a teacher.
    """

    ids: Ids
    positions: Ids
    labels: Ids  # already shifted: labels[t] is the token after ids[t], or IGNORED
    segment: Ids
    so_far: Ids
    remaining: Ids
    achieved: Ids
    preferred: Ids
    soft_ids: Ids
    soft_log_p: npt.NDArray[np.float32]

    def rows(self, which: slice) -> Batch:
        """A batch of these rows."""
        return Batch(*(getattr(self, name)[which] for name in self.__slots__))

    @property
    def loss_tokens(self) -> int:
        """Tokens that are to be imitated."""
        return int(((self.labels != IGNORED) & (self.preferred >= 0)).sum())


class Packer:
    """Deterministic batches: (seed, epoch, batch number) decides what is in one."""

    def __init__(
        self,
        records: Sequence[Encoded],
        schema: CommandSchema,
        *,
        rows: int,
        length: int,
        dropout: float,
        seed: int,
        bare: float = 0.0,
        judged: bool = False,
        paired: bool = False,
        soft_labels: SoftLabels | None = None,
    ) -> None:
        """dropout: of each axis of a command; bare: of all at once. judged: every other command
        asks for the highest level, whatever its response achieved: one that did not is only to be
        judged then, and not to be imitated. paired: puts a record of the highest level and a lower
        one of the same request into one row, under the command of the first; makes as many such
        pairs of each request as there are. The partner is the response that begins alike for
        longest, which shows where the worse one went wrong; where several do, another one every
        epoch. soft_labels: they have all records, each under its whole command, which is taught
        under a dropped one too."""
        self._records, self._schema = records, schema
        self._rows, self._length, self._seed = rows, length, seed
        self._dropout, self._bare, self._judged = dropout, bare, judged
        self._top, self._paired = schema.levels - 1, paired
        self._soft = soft_labels
        # Whether sentences are judged: were those of good responses alone, all would seem good.
        self._located = any(record.fault is not None for record in records)

    def _size(self, indices: Sequence[int]) -> int:
        """Tokens of these records."""
        return sum(
            (self._schema.overhead if record.record else 1)
            + len(record.request)
            + len(record.response)
            for record in (self._records[index] for index in indices)
        )

    def _is_best(self, index: int) -> bool:
        record = self._records[index].record
        return record is not None and record.kind != "cut" and record.command.relevance == self._top

    def _pairs(self, row: Sequence[int]) -> list[int]:
        """Of each record of a row: `Batch.preferred`."""
        found = [0] * len(row)
        if self._paired:
            for at, (first, second) in enumerate(pairwise(row)):
                request, best = self._request(first), self._is_best(first)
                if best and request == self._request(second) and not self._is_best(second):
                    found[at] = max(found) + 1
                    found[at + 1] = -found[at]
        return found

    def _request(self, index: int) -> tuple[str | None, str] | None:
        """What responses have in common that can be compared. A cut cannot: it is no worse than
        the whole response for being shorter."""
        record = self._records[index].record
        if record is None or record.kind == "cut":
            return None
        return record.command.task, record.request

    def _units(self, number: int) -> list[tuple[int, ...]]:
        """The records of an epoch, those of a pair together."""
        if not self._paired:
            return [(index,) for index in range(len(self._records))]
        rng = random.Random(f"{self._seed}/{number}/pairs")
        groups: dict[tuple[str | None, str], tuple[list[int], list[int]]] = {}
        units: list[tuple[int, ...]] = []
        for index in range(len(self._records)):
            if (request := self._request(index)) is None:
                units.append((index,))
            else:
                groups.setdefault(request, ([], []))[self._is_best(index)].append(index)
        for others, best in groups.values():
            rng.shuffle(others)
            rng.shuffle(best)
            for first in best:
                fitting = [i for i in others if self._is_pair(first, i)]
                if fitting:
                    second = max(fitting, key=partial(self._alike, first))
                    others.remove(second)
                    units.append((first, second))
                else:
                    units.append((first,))
            units += [(index,) for index in others]
        return units

    def _is_pair(self, first: int, second: int) -> bool:
        """Whether they differ, as two judgements of one answer do not, and fit into a row."""
        one, other = (self._records[index].response for index in (first, second))
        return one != other and self._size((first, second)) <= self._length

    def _alike(self, first: int, second: int) -> int:
        """Number of tokens that two responses, which differ, begin with alike."""
        one, other = (self._records[index].response for index in (first, second))
        return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)

    def epoch(self, number: int, *, partial: bool = False) -> list[list[list[int]]]:
        """The plan of an epoch: batches of rows of record indices.

        First-fit over a small window of open rows: about 97% of the positions are used.
        partial: with a last batch of fewer rows, so that no record is left out.
        """
        units = self._units(number)
        random.Random(f"{self._seed}/{number}").shuffle(units)
        open_rows: list[tuple[int, list[int]]] = []
        full: list[list[int]] = []
        for unit in units:
            size = self._size(unit)
            for i, (left, row) in enumerate(open_rows):
                if size <= left:
                    row.extend(unit)
                    open_rows[i] = (left - size, row)
                    break
            else:
                open_rows.append((self._length - size, [*unit]))
                if len(open_rows) > 64:
                    tightest = min(range(len(open_rows)), key=lambda i: open_rows[i][0])
                    full.append(open_rows.pop(tightest)[1])
        full += [row for _, row in open_rows]
        random.Random(f"{self._seed}/{number}/rows").shuffle(full)
        end = len(full) if partial else len(full) - self._rows + 1
        return [full[i : i + self._rows] for i in range(0, end, self._rows)]

    def _asked(self, record: Record | None, rng: random.Random) -> tuple[Command | None, bool, int]:
        """Of a record in one batch: its command, whether its response is imitated, `achieved`."""
        if record is None:
            return None, True, IGNORED
        command = record.command
        if record.kind != "mismatch":  # which is wrong without its level
            command = drop(command, self._dropout, rng, self._bare)
        if not self._judged:
            return command, True, IGNORED
        is_best = record.command.relevance == self._top
        if command.relevance is None:
            return command, True, int(is_best)
        if rng.random() < 0.5:
            return replace(command, relevance=self._top), is_best, int(is_best)
        return command, True, IGNORED

    def batch(self, epoch: int, number: int, rows: list[list[int]]) -> Batch:
        """Arrays of one batch of the plan; command dropout is drawn from its number."""
        rng = random.Random(f"{self._seed}/{epoch}/{number}/dropout")
        shape = (len(rows), self._length)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels, segment, so_far, remaining, achieved = (np.full(shape, IGNORED) for _ in range(5))
        segment[:] = -1
        preferred = np.zeros(shape, np.int64)
        top_k = self._soft.top_k if self._soft else 0
        soft_ids = np.zeros((*shape, top_k), np.int64)
        soft_log_p = np.zeros((*shape, top_k), np.float32)
        for r, row in enumerate(rows):
            at, pairs = 0, self._pairs(row)
            for s, index in enumerate(row):
                encoded, pair = self._records[index], pairs[s]
                if not pair:
                    command, imitated, is_best = self._asked(encoded.record, rng)
                elif encoded.record:
                    if pair > 0:  # the other one, which comes next, has the same command
                        command = drop(encoded.record.command, self._dropout, rng, self._bare)
                    imitated, is_best = True, int(pair > 0)
                prompt = encoded.prompt(self._schema, command)
                tokens = prompt + encoded.response
                stop = at + len(tokens)
                achieved[r, stop - 1] = is_best
                if self._located and is_best != IGNORED:
                    for end, is_good in encoded.judged(is_best).items():
                        achieved[r, at + len(prompt) + end - 1] = is_good
                ids[r, at:stop] = tokens
                positions[r, at:stop] = np.arange(len(tokens))
                segment[r, at:stop] = s
                # The last prompt token predicts the first response token.
                labelled = slice(at + len(prompt) - 1, stop - 1)
                learnt = slice(None if imitated else 0)
                if pair:
                    other = row[s + 1 if pair > 0 else s - 1]
                    compared = encoded.compared(self._alike(index, other))
                    preferred[r, labelled][compared] = pair
                    preferred[r, stop - 1] = pair
                    if pair < 0:
                        learnt = compared
                labels[r, labelled][learnt] = encoded.response[learnt]
                if encoded.begun:
                    begun = np.asarray(encoded.begun)
                    so_far[r, labelled] = begun
                    if command and command.words is not None:
                        remaining[r, labelled] = begun[-1] - begun
                if self._soft:
                    whole = encoded.prompt(self._schema) + encoded.response
                    soft_ids[r, labelled], soft_log_p[r, labelled] = self._soft[whole]
                at = stop
        facts = so_far, remaining, achieved, preferred
        return Batch(ids, positions, labels, segment, *facts, soft_ids, soft_log_p)
