"""The command grammar: the outcomes that a caller may ask for, as special tokens.

Upside-down reinforcement learning (Schmidhuber, arXiv 1912.02875; Srivastava et
al., arXiv 1912.02877) trains on "what was really achieved" and asks for it at
inference. Here a command is one value on each *axis* (task, words, relevance),
each value is one special token, and every axis has an "any" token for "left
unspecified". Axes are data: the schema travels in the checkpoint
(`command.json`) and in the bundle's manifest, with the support that training
saw. The spelling is our own choice; arXiv 2502.09854 does not publish its own.

A prompt is

    <|request|> request text <|task:T|> <|words:W|> <|relevance:R|> <|response|>

and the model answers with the response text and `<|end|>`. A schema may also put
the command before the request, or on both sides (`CommandSchema.position`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np

from edge_slm_runtime.errors import (
    BadSetting,
    ManifestInvalid,
    RelevanceOutOfRange,
    UnknownTask,
    WordsOutOfRange,
    shown,
)
from edge_slm_runtime.request_text import clean_request

REQUEST, RESPONSE, END = "<|request|>", "<|response|>", "<|end|>"
ANY = "any"

# Published edges of the words buckets: bucket i holds edges[i] <= words < edges[i + 1].
# Single words up to 12, then steps of about 9%, so that a bucket is never wider
# than the ±10% tolerance of the length promise.
WORD_EDGES: tuple[int, ...] = (
    *range(1, 13),
    *(13, 14, 15, 17, 19, 21, 23, 25, 27, 30, 33, 36, 39, 43, 47, 51, 56, 61, 67, 73),
    *(80, 87, 95, 104, 113, 123, 134, 146, 161),
)
RELEVANCE_LEVELS = 10  # unless the schema says otherwise
Position = Literal["bottom", "top", "both"]  # of the command, seen from the request
Case = Literal["lower", "title"]  # of a request

_VALUE = re.compile(r"[A-Za-z0-9_-]+")  # allowed after the colon
_KINDS = [("task", "category"), ("words", "bucket"), ("relevance", "level")]


def count_words(text: str) -> int:
    """Words are separated by white space; this is the only definition."""
    return len(text.split())


def is_count(value: object) -> bool:
    """True for 0, 1, 2 …, numpy's too; Python counts True as a number, we do not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def python_value(value: Any) -> Any:
    """A number of numpy as one of Python; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


@dataclass(frozen=True, slots=True)
class Command:
    """What is asked of the model; `None` leaves an axis unspecified.

    task: one of the schema's categories. words: a count. relevance: a level,
    0 (lowest) … `RELEVANCE_LEVELS - 1`, a per-task quantile of the reward.
    """

    task: str | None = None
    words: int | None = None
    relevance: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            object.__setattr__(self, name, python_value(value))

    def as_dict(self) -> dict[str, str | int | None]:
        """Axis → value, None where it is left open."""
        return {"task": self.task, "words": self.words, "relevance": self.relevance}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the command.

    kind: `category` (values are names), `bucket` (values are "lo-hi" from
    `edges`, len(values) + 1 of them), or `level` (values are "0", "1", …).
    """

    name: str
    kind: Literal["category", "bucket", "level"]
    values: tuple[str, ...]
    edges: tuple[int, ...] = ()

    def token(self, value: str) -> str:
        return f"<|{self.name}:{value}|>"

    def tokens(self) -> list[str]:
        """The axis's special tokens, `any` first."""
        return [self.token(value) for value in (ANY, *self.values)]

    def value_of(self, asked: str | int | None) -> str:
        """The axis value that `asked` falls into; `any` for None.

        Raises UnknownTask, WordsOutOfRange or RelevanceOutOfRange.
        """
        if asked is None:
            return ANY
        if self.kind == "category":
            if not isinstance(asked, str) or asked not in self.values:
                raise UnknownTask(
                    f"unknown {self.name} {shown(asked)}", f"known: {', '.join(self.values)}"
                )
            return asked
        if isinstance(asked, bool) or not isinstance(asked, int):
            raise BadSetting(f"{self.name} must be a whole number, got {shown(asked)}")
        if self.kind == "level":
            if not 0 <= asked < len(self.values):
                raise RelevanceOutOfRange(
                    f"{self.name} {shown(asked)} is out of range",
                    f"give 0 … {len(self.values) - 1}",
                )
            return self.values[asked]
        low, high = self.edges[0], self.edges[-1] - 1
        if not low <= asked <= high:
            raise WordsOutOfRange(
                f"{self.name} {shown(asked)} is out of range", f"give {low} … {high}"
            )
        return self.values[bisect_right(self.edges, asked) - 1]

    def bounds(self, value: str) -> tuple[int, int]:
        """(first, last) count of a bucket, both inclusive; (level, level) of a level."""
        index = self.values.index(value)
        if self.kind == "bucket":
            return self.edges[index], self.edges[index + 1] - 1
        return index, index


def default_axes(tasks: Sequence[str], levels: int = RELEVANCE_LEVELS) -> tuple[Axis, ...]:
    """The axes of this project's models: task, words, relevance."""
    edges = WORD_EDGES
    buckets = tuple(f"{lo}" if hi - lo == 1 else f"{lo}-{hi - 1}" for lo, hi in pairwise(edges))
    return (
        Axis("task", "category", tuple(tasks)),
        Axis("words", "bucket", buckets, edges),
        Axis("relevance", "level", tuple(str(level) for level in range(levels))),
    )


@dataclass(frozen=True, slots=True)
class Checked:
    """A validated command: as asked, as given to the model, and why they differ."""

    asked: Command
    commanded: Command
    warnings: tuple[str, ...] = ()

    @property
    def words(self) -> int | None:
        """The length to keep: the commanded one, or what was asked of a model without grammar."""
        return self.asked.words if self.commanded.words is None else self.commanded.words


@dataclass(frozen=True, slots=True)
class CommandSchema:
    """The axes, and per task how many training samples each value had.

    support: task → axis name → axis value → count. A value with fewer than
    `min_support` samples counts as unseen. Empty support means "not recorded":
    everything in range is then taken as supported. position: where the command
    stands; next to the answer ("bottom") small models follow it best. cases: task → case in
    which its requests are written, that of its answers, so that copied words are the same
    tokens on both sides. spaced: whether a space precedes a request, for the same reason.
    verbatim: tasks whose requests are texts that the answer has to show as they are. restated:
    tasks whose answers begin with the request. confidence: whether the model tells, behind an
    answer, how likely that has the highest level of relevance.
    """

    axes: tuple[Axis, ...]
    support: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    min_support: int = 20
    position: Position = "bottom"
    cases: Mapping[str, Case] = field(default_factory=dict)
    spaced: bool = False
    verbatim: tuple[str, ...] = ()
    restated: tuple[str, ...] = ()
    confidence: bool = False

    # -- tokens ---------------------------------------------------------------

    def special_tokens(self) -> list[str]:
        """All control tokens; in a tokenizer that training makes they are ids 0 … len-1."""
        return [END, REQUEST, RESPONSE, *(t for axis in self.axes for t in axis.tokens())]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return self.axis("task").values

    def axis(self, name: str) -> Axis:
        """The axis of that name."""
        return next(axis for axis in self.axes if axis.name == name)

    def command_tokens(self, command: Command) -> list[str]:
        """One token per axis, in axis order. Raises as `Axis.value_of`."""
        asked = command.as_dict()
        return [axis.token(axis.value_of(asked[axis.name])) for axis in self.axes]

    @property
    def levels(self) -> int:
        """Number of relevance levels."""
        return len(self.axis("relevance").values)

    @property
    def overhead(self) -> int:
        """Prompt tokens beside those of the request."""
        return len(self.axes) * (2 if self.position == "both" else 1) + 2

    def render(self, request: str, command: Command) -> str:
        """The prompt as text (for people and tests; the model gets `encode`)."""
        before, after = self.around(command)
        return before + self.recased(clean_request(request), command.task) + after

    def recased(self, request: str, task: str | None) -> str:
        """A request in the case of its task."""
        case = self.cases.get(task or "")
        if case == "lower":
            return request.lower()
        if case == "title":
            return " ".join(word[:1].upper() + word[1:] for word in request.split(" "))
        return request

    def around(self, command: Command) -> tuple[str, str]:
        """Control tokens (before, after) the request, as text. Raises as `Axis.value_of`."""
        before, after = self._around(command)
        return "".join(before) + " " * self.spaced, "".join(after)

    def _around(self, command: Command) -> tuple[list[str], list[str]]:
        told = self.command_tokens(command)
        return (
            [REQUEST, *(told if self.position != "bottom" else [])],
            [*(told if self.position != "top" else []), RESPONSE],
        )

    def frame(self, request: Sequence[int], command: Command) -> list[int]:
        """Prompt token ids around the ids of a request, under a tokenizer that training made."""
        ids = {token: i for i, token in enumerate(self.special_tokens())}
        before, after = self._around(command)
        return [*(ids[token] for token in before), *request, *(ids[token] for token in after)]

    def parse(self, text: str) -> tuple[str, dict[str, str], str]:
        """Inverse of `render`: (request, axis → value, response without `<|end|>`).

        Raises BadSetting when `text` is not a rendered prompt.
        """
        body, found, response = text.partition(RESPONSE)
        if not found or not body.startswith(REQUEST):
            raise BadSetting("not a rendered prompt", f"expected {REQUEST} … {RESPONSE}")
        told = "".join(rf"<\|{axis.name}:(?P<{axis.name}>[A-Za-z0-9_-]+)\|>" for axis in self.axes)
        shapes = {
            "bottom": rf"(?P<request_text>.*?){told}",
            "top": rf"{told}(?P<request_text>.*)",
            # The second command has to repeat the first.
            "both": rf"{told}(?P<request_text>.*?)"
            + "".join(rf"<\|{axis.name}:(?P={axis.name})\|>" for axis in self.axes),
        }
        match = re.fullmatch(shapes[self.position], body.removeprefix(REQUEST), re.DOTALL)
        if not match:
            raise BadSetting("no command where one belongs")
        values = match.groupdict()
        request = values.pop("request_text")
        for axis in self.axes:
            if values[axis.name] not in (ANY, *axis.values):
                raise BadSetting(f"no {axis.name} token where one belongs")
        return request, values, response.removesuffix(END)

    # -- validation -----------------------------------------------------------

    def check(self, command: Command) -> Checked:
        """Validates ranges; moves each value to the nearest one that training saw.

        Raises UnknownTask, WordsOutOfRange, RelevanceOutOfRange, BadSetting.
        """
        asked = command.as_dict()
        told = dict(asked)
        warnings: list[str] = []
        values = {axis.name: axis.value_of(asked[axis.name]) for axis in self.axes}
        seen = self.support.get(command.task or "", {})
        for axis in self.axes:
            counts = seen.get(axis.name)
            value, number = values[axis.name], asked[axis.name]
            if counts is None or value == ANY or axis.kind == "category":
                continue
            supported = self.supported(axis, command.task)
            if not supported or value in supported or not isinstance(number, int):
                continue
            low, high = min(
                (axis.bounds(v) for v in supported),
                key=lambda b: min(abs(b[0] - number), abs(b[1] - number)),
            )
            told[axis.name] = nearest = low if number < low else high
            first, last = axis.bounds(supported[0])[0], axis.bounds(supported[-1])[1]
            warnings.append(
                f"{axis.name} {number} is outside what training saw for task "
                f"{command.task!r} ({first} … {last}); commanding {nearest}"
            )
        return Checked(command, Command(**told), tuple(warnings))  # type: ignore[arg-type]

    def supported(self, axis: Axis, task: str | None) -> list[str]:
        """The values of an axis that training saw often enough for a task."""
        counts = self.support.get(task or "", {}).get(axis.name, {})
        return [value for value in axis.values if counts.get(value, 0) >= self.min_support]

    # -- data -----------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Contents of command.json, which `from_json` reads."""
        return {
            "axes": [
                {"name": a.name, "kind": a.kind, "values": list(a.values), "edges": list(a.edges)}
                for a in self.axes
            ],
            "min_support": self.min_support,
            "position": self.position,
            **({"cases": dict(self.cases)} if self.cases else {}),
            **({"spaced": True} if self.spaced else {}),
            **({"verbatim": list(self.verbatim)} if self.verbatim else {}),
            **({"restated": list(self.restated)} if self.restated else {}),
            **({"confidence": True} if self.confidence else {}),
            "support": {t: {a: dict(c) for a, c in s.items()} for t, s in self.support.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> CommandSchema:
        """Raises ManifestInvalid when `data` is not a schema of this version."""
        try:
            axes = tuple(
                Axis(a["name"], a["kind"], tuple(a["values"]), tuple(a.get("edges", ())))
                for a in data["axes"]
            )
            schema = cls(
                axes,
                data.get("support", {}),
                data.get("min_support", 20),
                data.get("position", "bottom"),
                data.get("cases", {}),
                data.get("spaced", False),
                tuple(data.get("verbatim", ())),
                tuple(data.get("restated", ())),
                data.get("confidence", False),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ManifestInvalid(f"command schema is malformed: {error!r}") from None
        if [(axis.name, axis.kind) for axis in axes] != _KINDS:
            wanted = ", ".join(f"{name} ({kind})" for name, kind in _KINDS)
            raise ManifestInvalid(f"command schema must have the axes {wanted}")
        for axis in axes:
            _check_axis(axis)
        if schema.position not in get_args(Position):
            raise ManifestInvalid(f"command schema: unknown position {shown(schema.position)}")
        cases = schema.cases.items() if isinstance(schema.cases, Mapping) else [("", "")]
        if any(case not in get_args(Case) or not isinstance(task, str) for task, case in cases):
            raise ManifestInvalid("command schema: cases must be task → lower or title")
        for name in ("spaced", "confidence"):
            if not isinstance(getattr(schema, name), bool):
                raise ManifestInvalid(f"command schema: {name} must be true or false")
        for name in ("verbatim", "restated"):
            if not set(getattr(schema, name)) <= set(schema.tasks):
                raise ManifestInvalid(f"command schema: {name} must be tasks of it")
        if not is_count(schema.min_support) or not _holds_counts(schema.support, depth=3):
            raise ManifestInvalid("command schema: support must be task → axis → value → count")
        return schema


def _check_axis(axis: Axis) -> None:
    names = (ANY, *axis.values)
    if len(names) < 2 or not all(isinstance(v, str) and _VALUE.fullmatch(v) for v in names):
        raise ManifestInvalid(f"axis {axis.name}: values must be names of {_VALUE.pattern}")
    if len(set(names)) != len(names):
        raise ManifestInvalid(f"axis {axis.name}: a value comes twice")
    if len(axis.edges) != (len(axis.values) + 1 if axis.kind == "bucket" else 0):
        raise ManifestInvalid(f"axis {axis.name}: edges do not fit the values")
    if not all(map(is_count, axis.edges)) or any(lo >= hi for lo, hi in pairwise(axis.edges)):
        raise ManifestInvalid(f"axis {axis.name}: edges must be rising whole numbers")


def _holds_counts(data: object, depth: int) -> bool:
    """True when `data` is `depth` mappings deep and counts lie at its bottom."""
    if not depth:
        return is_count(data)
    return isinstance(data, Mapping) and all(_holds_counts(v, depth - 1) for v in data.values())
