"""Random search of the property tests: `make fuzz`, FUZZ_MINUTES=10, FUZZ_SEED= to repeat,
FUZZ_EXAMPLES= damaged files for each test that reads them.

Runs all property tests with new examples, round after round, until the time is over. A
failure prints the falsifying example and the seed that finds it again.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time


def run_round(seed: int, seconds: float, arguments: list[str]) -> int | None:
    """The exit status of pytest; None when the time was over before it ended."""
    command = [sys.executable, "-m", "pytest", "-m", "hypothesis", f"--hypothesis-seed={seed}"]
    command += ["--timeout=0", "--hypothesis-show-statistics"]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "fuzz"}
    try:
        done = subprocess.run([*command, *arguments], env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def main(arguments: list[str]) -> int:
    """arguments: of pytest, such as the path of one test file."""
    minutes = float(os.environ.get("FUZZ_MINUTES") or 10)
    given = os.environ.get("FUZZ_SEED")
    deadline = time.monotonic() + 60 * minutes
    rounds = 0
    while (seconds := deadline - time.monotonic()) > 0:
        seed = int(given) if given else secrets.randbelow(2**32)
        status = run_round(seed, seconds, arguments)
        if status:
            print(f"seed {seed}; to repeat: make fuzz FUZZ_SEED={seed}", file=sys.stderr)
            return status
        if status is None or given:
            break
        rounds += 1
    print(f"{rounds} rounds of random examples without a failure", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
