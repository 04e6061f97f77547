"""Random search of the property tests: `make fuzz`, FUZZ_MINUTES=10, FUZZ_SEED= to repeat.

Runs the property tests and those of damaged files with new examples, round after round, until the
time is over or one fails. With FUZZ_FILES=onnx=10000,manifest=20000 (or FUZZ_FILES=1000 of each
kind) it damages so many files, once, however long it takes. What became of them is a table on
stdout; files over which a test failed are kept in `fuzz-failures/`, and the seed that finds them
again is said.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from damage import asked_files
from rich.console import Console
from rich.table import Table

KEPT = "fuzz-failures"
COLUMNS = ("read", "refused", "crashes", "hangs", "raw errors")


def run_round(seed: int, seconds: float | None, counts: Path, arguments: list[str]) -> int | None:
    """The exit status of pytest; None when the time was over before it ended."""
    files = os.environ.get("FUZZ_FILES")
    command = [sys.executable, "-m", "pytest", "-m", "fuzz" if files else "hypothesis or fuzz"]
    command += [f"--hypothesis-seed={seed}", "--timeout=0"]
    environment = {
        **os.environ,
        "HYPOTHESIS_PROFILE": "fuzz",
        "FUZZ_SEED": str(seed),
        "FUZZ_COUNTS": str(counts),
        "FUZZ_KEPT": KEPT,
    }
    try:
        done = subprocess.run([*command, *arguments], env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def read_counts(path: Path) -> dict[str, Counter[str]]:
    """What became of the files, by kind, in all rounds."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        found[row.pop("kind")].update(row)
    return found


def table_of(found: Mapping[str, Counter[str]]) -> Table:
    """Of `read_counts`."""
    table = Table("damaged", "files", *COLUMNS)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, numbers in sorted(found.items()):
        table.add_row(
            kind, *(f"{n:,}" for n in (numbers.total(), *(numbers[name] for name in COLUMNS)))
        )
    return table


def main(arguments: list[str]) -> int:
    """arguments: of pytest, such as the path of one test file."""
    minutes = float(os.environ.get("FUZZ_MINUTES") or 10)
    given, once = os.environ.get("FUZZ_SEED"), bool(os.environ.get("FUZZ_FILES"))
    deadline = time.monotonic() + 60 * minutes
    rounds, status = 0, None
    with tempfile.TemporaryDirectory() as folder:
        (counts := Path(folder) / "counts").touch()
        while once or deadline > time.monotonic():
            seed = int(given) if given else secrets.randbelow(2**32)
            print(f"seed {seed}", file=sys.stderr)
            seconds = None if once else max(0.0, deadline - time.monotonic())
            status = run_round(seed, seconds, counts, arguments)
            rounds += status == 0
            if status != 0 or given or once:
                break
        found = read_counts(counts)
    Console().print(table_of(found))
    if status:
        print(f"to repeat: make fuzz FUZZ_SEED={seed}; files: {KEPT}/", file=sys.stderr)
        return status
    if unknown := asked_files(os.environ.get("FUZZ_FILES", "")).keys() - {"", *found}:
        print(f"no test damages {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    print(f"{rounds} rounds of random examples without a failure", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
