"""The faster precision of a device: bf16 may be twice or half as fast as fp32 on a CPU."""

from __future__ import annotations

import time
from functools import cache
from typing import Any, Literal

Precision = Literal["bf16", "fp32", "auto"]


def use_bf16(precision: Precision) -> bool:
    """Whether to compute in bf16; "auto" times a matrix product in both, once per process."""
    return precision == "bf16" or (precision == "auto" and _bf16_is_faster())


@cache
def _bf16_is_faster() -> bool:
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return seconds_of_product(torch.bfloat16) < seconds_of_product(torch.float32)


def seconds_of_product(dtype: Any, size: int = 512, device: str = "cpu") -> float:
    """The best time of several square matrix products."""
    import torch

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best
