"""Writes an ONNX graph node by node, its weights as external data in one file.

Tensors go to `model.data` as they are added, so a conversion never holds two
copies of a model. Identical bytes are written once: that is how the tied
embedding stays one tensor on disk, whatever its precision.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edge_slm_converters.arrays import Array
from edge_slm_runtime.errors import DependencyMissing

# Old enough for onnxruntime 1.23.2, which is what JetPack 6 has.
OPSET, IR_VERSION = 20, 10
FUSED = "com.microsoft"
MODEL_FILE, DATA_FILE = "model.onnx", "model.data"
# Constants below this many bytes stay in the graph file, where shape inference sees them.
INLINE_BYTES = 256
PAGE = 4096  # tensors start on a page, so that onnxruntime can map them


def import_onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise DependencyMissing(
            "writing ONNX needs onnx", "pip install 'edge-slm[convert]'"
        ) from None
    return onnx


class GraphWriter:
    """Collects nodes, streams weights to `folder/model.data`.

    `weight_bytes` counts the bytes of the tensors written, without alignment.
    """

    def __init__(self, folder: Path) -> None:
        self._onnx = import_onnx()
        self._folder = folder
        self._data = (folder / DATA_FILE).open("xb")
        self._stored: dict[tuple[str, int], int] = {}  # (sha256, size) → offset
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.weight_bytes = 0
        self.operators: Counter[str] = Counter()

    def node(
        self, op: str, inputs: list[str], output: str | list[str], domain: str = "", **attrs: Any
    ) -> str:
        """Adds a node; "" leaves an optional input or output out. Returns its first output."""
        outputs = [output] if isinstance(output, str) else output
        self._nodes.append(
            self._onnx.helper.make_node(
                op, inputs, outputs, name=outputs[0], domain=domain, **attrs
            )
        )
        self.operators[op] += 1
        return outputs[0]

    def constant(self, name: str, array: Array) -> str:
        """Adds a tensor under `name`; equal bytes share their place on disk."""
        if name in self._constants:
            raise ValueError(f"constant {name} is defined twice")
        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_BYTES:
            self._constants[name] = self._onnx.numpy_helper.from_array(array, name)
            return name
        raw = array.tobytes()
        key = hashlib.sha256(raw).hexdigest(), len(raw)
        if key not in self._stored:
            self._data.write(b"\0" * (-self._data.tell() % PAGE))
            self._stored[key] = self._data.tell()
            self._data.write(raw)
            self.weight_bytes += len(raw)
        tensor = self._onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=self._onnx.TensorProto.EXTERNAL,
        )
        for field, value in (
            ("location", DATA_FILE),
            ("offset", self._stored[key]),
            ("length", len(raw)),
        ):
            tensor.external_data.add(key=field, value=str(value))
        self._constants[name] = tensor
        return name

    def shared(self, name: str, array: Array) -> str:
        """A tensor that several nodes use, added under `name` the first time."""
        return name if name in self._constants else self.constant(name, array)

    def indices(self, *values: int) -> str:
        """A shared int64 vector: axes, positions, shapes."""
        return self.shared(f"int64{list(values)}", np.array(values, np.int64))

    def input(self, name: str, dtype: Any, shape: list[int | str]) -> str:
        self.inputs.append(self._value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: list[int | str]) -> str:
        self.outputs.append(self._value(name, dtype, shape))
        return name

    def _value(self, name: str, dtype: Any, shape: list[int | str]) -> Any:
        element = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self._onnx.helper.make_tensor_value_info(name, element, shape)

    def save(self, name: str) -> None:
        """Writes `model.onnx` and closes the data file."""
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes, name, self.inputs, self.outputs, list(self._constants.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(FUSED, 1)],
            ir_version=IR_VERSION,
            producer_name="edge_slm",
        )
        (self._folder / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
        self._data.close()
