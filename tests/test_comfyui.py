"""The ComfyUI node pack, imported and run as ComfyUI does."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import edge_slm
from edge_slm import EdgeSlmError

PACK = Path(__file__).parents[1] / "integrations" / "comfyui-edge-slm"


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    """As `load_custom_node` of ComfyUI: the folder is a module named by its path."""
    name = str(PACK).replace(".", "_x_")
    spec = spec_from_file_location(name, PACK / "__init__.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def defaults(node: Any) -> dict[str, Any]:
    """What the front end shows at first: the first of a list, else the default."""
    widgets = node.INPUT_TYPES()["required"]
    return {
        name: kind[0] if isinstance(kind, list) else options[0]["default"]
        for name, (kind, *options) in widgets.items()
    }


def test_the_node_writes(pack: ModuleType) -> None:
    (node,) = pack.NODE_CLASS_MAPPINGS.values()
    assert pack.NODE_DISPLAY_NAME_MAPPINGS.keys() == pack.NODE_CLASS_MAPPINGS.keys()
    inputs = defaults(node) | {"model": "shipped", "task": "image", "words": 12}
    (text,) = getattr(node(), node.FUNCTION)(**inputs)
    with edge_slm.load() as slm:
        assert text == slm.generate(inputs["request"], task="image", words=12, best_of=8).text
    drawn = inputs | {"temperature": 0.8}
    assert node.IS_CHANGED(**inputs) == node.IS_CHANGED(**inputs | {"seed": 1})
    assert node.IS_CHANGED(**drawn) != node.IS_CHANGED(**drawn | {"seed": 1})
    assert getattr(node(), node.FUNCTION)(**inputs | {"task": "any", "words": 0})[0]


def test_what_the_model_cannot_do_is_one_clear_error(pack: ModuleType) -> None:
    node = pack.EdgeSlmPrompt
    with pytest.raises(EdgeSlmError, match="poem"):
        node().write(**defaults(node) | {"task": "poem"})
