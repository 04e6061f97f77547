"""How well the score of `best_of` finds a usable answer: `python bench/ranking.py`.

`graded.jsonl` beside this file has eight answers each to requests that training had not seen, as
another int4 rounding of prompts-115m 0.3.0 computed them for the best of eight, with the
confidence of the shipped one, each graded by two readers (language models that were told the
request and nothing else): usable as it is to both, or not.
Prints the share of usable answers, that of those with the highest score, and that of requests with
a usable answer among the eight, which no way of choosing can exceed, for tasks of ten requests and
all. 95% intervals, bootstrap over requests. 40 of the requests are from the public lists that
recipes/written/NOTICE names, under their licences.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_bench.metrics.quality import bootstrap_mean
from edge_slm_runtime.ranking import score

FEWEST = 10  # requests of a task that has a row
GRADED = Path(__file__).with_name("graded.jsonl")
Row = dict[str, Any]


def shares(answers: Sequence[Row]) -> tuple[float, float, float]:
    """Of the answers to one request: usable ones, whether the chosen one is, whether any is."""
    usable = [row["usable"] for row in answers]
    scores = [
        score(
            [row["logprob"]],
            row["request"],
            row["text"],
            torn=row["torn"],
            shows_text=row["task"] == "lettering",
            confidence=row.get("confidence"),
        )
        for row in answers
    ]
    return float(np.mean(usable)), float(usable[int(np.argmax(scores))]), float(max(usable))


def main() -> None:
    requests: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in map(json.loads, GRADED.read_text("utf-8").splitlines()):
        requests[row["task"], row["request"]].append(row)
    print(f"{'':10}{'requests':>9}{'an answer':>22}{'the chosen one':>22}{'any of eight':>22}")
    tasks = Counter(task for task, _ in requests)
    for name in (*(task for task, count in tasks.items() if count >= FEWEST), "all"):
        rows = [shares(one) for (task, _), one in requests.items() if name in (task, "all")]
        cells = []
        for column in np.array(rows).T:
            found = bootstrap_mean(column)
            cells.append(f"{found.value:.0%} [{found.low:.0%}, {found.high:.0%}]")
        print(f"{name:10}{len(rows):9}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
