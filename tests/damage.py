"""Random damage to files, and the tests that read them.

`make test` tries the same few files every time, `make fuzz` new ones, as many as FUZZ_FILES says.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from isolation import Crash, Hang

from edge_slm_runtime.errors import EdgeSlmError

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 63, 64, 65, 10**6, 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**63, 2**64, 10**30, 10**400, -(10**400), 0.0, -0.0, 1.5, 1e308, 5e-324, "", "x", "any"),
    *("int8", "int2", "onnxruntime", "gelu", "false", "\ud800", "e\u0301", "\u202e", "\x1b[31m"),
    *("a" * 100_000, "[/]", "../x", "/etc/passwd", "CON", "a.", " ", [], {}, [[]], [{}]),
    *({"a": {}}, {"top1": 10**400}, [1, 2, 3], ["a", "b"], [None] * 1000, [["a", "b"]]),
    *(float("nan"), float("inf"), float("-inf")),
)


_SHOWN = 5  # failures of a kind
_tried: list[tuple[str, bytes]] = [("", b"")]


def asked_files(text: str) -> dict[str, int]:
    """Files to damage, by kind: "onnx=10000,manifest=20000", or "10000" of each (kind "")."""
    pairs = [part.rpartition("=") for part in text.split(",") if part]
    return {kind: int(count) for kind, _, count in pairs}


class Tally:
    """What became of the damaged files of a kind.

    count: how many there are to be. seed: of the run; a file has its own, made of it.
    """

    def __init__(self, kind: str, count: int) -> None:
        asked = asked_files(os.environ.get("FUZZ_FILES", ""))
        self.kind, self.count = kind, asked.get(kind, asked.get("", count))
        self.seed = os.environ.get("FUZZ_SEED") or "0"
        self.found: Counter[str] = Counter()
        self._told: list[str] = []

    def failed(self, failure: str, number: int, told: str, name: str, content: bytes) -> None:
        """failure: "crashes", "hangs" or "raw errors", over `content`, which is kept."""
        self.found[failure] += 1
        place = "nowhere"
        if folder := os.environ.get("FUZZ_KEPT"):
            path = Path(folder) / f"{self.kind}-{self.seed}-{number}-{Path(name).name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            place = str(path)
        self._told.append(f"file {number} of seed {self.seed} ({failure}), kept {place}: {told}")

    def end(self) -> None:
        """Records the counts, and fails if there was a failure."""
        if path := os.environ.get("FUZZ_COUNTS"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": self.kind, **self.found}) + "\n")
        assert not self._told, "\n".join(self._told[:_SHOWN])


def tried(name: str, content: bytes) -> bytes:
    """`content`, noted as the damaged file under trial."""
    _tried[0] = name, content
    return content


def fuzz(kind: str, count: int) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """A test of `count` damaged files, each of its own `seed` (of `random.Random`). It returns why
    a file was refused, or "". Other errors than ours do not end it, but are counted."""

    def decorated(test: Callable[..., str]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            tally = Tally(kind, count)
            for number in range(tally.count):
                tried("nothing", b"")
                try:
                    refusal = test(seed=f"{tally.seed}/{kind}/{number}", **fixtures)
                except Exception as error:
                    kinds = {Crash: "crashes", Hang: "hangs"}
                    failure = kinds.get(type(error), "raw errors")
                    told = f"{type(error).__name__}: {error}"
                    tally.failed(failure, number, told, *_tried[0])
                else:
                    tally.found["refused" if refusal else "read"] += 1
            tally.end()

        signature = inspect.signature(test)
        fixtures = [p for p in signature.parameters.values() if p.name != "seed"]
        run.__signature__ = signature.replace(parameters=fixtures)  # type: ignore[attr-defined]
        return marked(kind)(run)

    return decorated


def marked(kind: str) -> Callable[..., Any]:
    """A test that `make fuzz` runs, unless FUZZ_FILES names other kinds."""
    asked = asked_files(os.environ.get("FUZZ_FILES", ""))
    left_out = bool(asked) and not {"", kind} & asked.keys()
    skipped = pytest.mark.skipif(left_out, reason="other kinds are asked for")
    return lambda test: pytest.mark.fuzz(skipped(test))


def refused(check: Callable[..., Any], *arguments: Any, errors: Any = EdgeSlmError) -> str:
    """Which of `errors` one of our own checks raises, "" for none; it is to raise no other."""
    try:
        check(*arguments)
    except errors as error:
        return type(error).__name__
    return ""


def bytes_damaged(choice: random.Random, content: bytes) -> bytes:
    """Some bits, bytes, words changed; pieces added or removed; cut short."""
    damaged = bytearray(content)
    for _ in range(choice.choice([1, 1, 2, 4, 16])):
        if not damaged:
            break
        place, kind, width = choice.randrange(len(damaged)), choice.randrange(10), 4
        if kind < 4:
            damaged[place] ^= 1 << choice.randrange(8)
        elif kind < 6:
            damaged[place] = choice.choice([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B])
        elif kind == 6:
            del damaged[place : place + choice.choice([1, 2, 4, 8, 100])]
        elif kind == 7:
            damaged[place:place] = choice.randbytes(choice.choice([1, 4, 8]))
        elif kind == 8:
            width = choice.choice([2, 4, 8])
            word = choice.choice([b"\xff" * width, bytes(width), b"\x7f" + b"\xff" * (width - 1)])
            damaged[place : place + width] = word
        else:
            del damaged[place:]
    return bytes(damaged)


def json_damaged(choice: random.Random, data: Any, values: Sequence[Any] = VALUES) -> Any:
    """A copy with some values replaced, removed, added or nested deeply."""
    data = copy.deepcopy(data)
    for _ in range(choice.choice([1, 1, 1, 2, 3])):
        places = list(_places(data))
        if not places:
            break
        owner, key = choice.choice(places)
        kind, value = choice.randrange(20), copy.deepcopy(choice.choice(values))
        if kind < 12:
            owner[key] = value
        elif kind < 14:
            del owner[key]
        elif kind < 16 and isinstance(owner, dict):
            owner[choice.choice(["zzz", "", "name", "\0", "A/b", "model.onnx", "../q"])] = value
        elif kind < 16:
            owner.append(copy.deepcopy(choice.choice([value, owner[0]])))
        elif kind < 17:
            for _ in range(choice.choice([10, 900, 2000])):
                value = [value]
            owner[key] = value
        elif isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
            owner[key] += choice.choice([-1, 1, 10**6, -(10**6), 0.5])
    return data


def json_bytes(choice: random.Random, data: Any) -> bytes:
    """Of what Python can write as JSON; of too deep a value, nothing."""
    try:
        text = json.dumps(data, ensure_ascii=choice.random() < 0.5)
    except RecursionError:
        return b"[" * 100_000
    return text.encode("utf-8", "surrogatepass")


def _places(data: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(owner, key) of every value; of long lists and objects the first few."""
    if isinstance(data, dict):
        keys: list[Any] = list(data)
    else:
        keys = list(range(len(data))) if isinstance(data, list) else []
    for key in keys[: 40 if depth < 2 else 12]:
        yield data, key
        if depth < 8:
            yield from _places(data[key], depth + 1)
