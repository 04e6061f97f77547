"""Random damage to files, and the settings of the tests that read them.

`make test` tries the same few seeds every time, `make fuzz` as many new ones as FUZZ_EXAMPLES says.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 63, 64, 65, 10**6, 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**63, 2**64, 10**30, 10**400, -(10**400), 0.0, -0.0, 1.5, 1e308, 5e-324, "", "x", "any"),
    *("int8", "int2", "onnxruntime", "gelu", "false", "\ud800", "e\u0301", "\u202e", "\x1b[31m"),
    *("a" * 100_000, "[/]", "../x", "/etc/passwd", "CON", "a.", " ", [], {}, [[]], [{}]),
    *({"a": {}}, {"top1": 10**400}, [1, 2, 3], ["a", "b"], [None] * 1000, [["a", "b"]]),
    *(float("nan"), float("inf"), float("-inf")),
)


def examples(count: int) -> int:
    return int(os.environ.get("FUZZ_EXAMPLES") or count)


def fuzz(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of `count` examples, each of its own `seed` (of `random.Random`)."""
    chosen = settings(
        max_examples=examples(count),
        deadline=None,
        phases=(Phase.explicit, Phase.generate),  # a seed has nothing to shrink
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: chosen(given(seed=st.binary(min_size=8, max_size=8))(test))


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
