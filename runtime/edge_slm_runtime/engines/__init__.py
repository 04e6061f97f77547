"""Engines: token sources with one interface (`base.Engine`), each class holding its facts.

A class is imported when it is asked for; the package that it needs, when it is opened.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_slm_runtime.engines.base import Engine

# In the order in which "auto" tries them.
ENGINES: Mapping[str, str] = {
    "numba": "numba_engine:NumbaEngine",
    "onnxruntime": "onnx:OnnxEngine",
    "ctranslate2": "ct2:CTranslate2Engine",
}
PRECISIONS = ("int8", "int4", "fp32")  # likewise


def engine_class(name: str) -> type[Engine]:
    """Raises KeyError for another name than those of ENGINES."""
    module, _, attribute = ENGINES[name].partition(":")
    found: type[Engine] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return found
