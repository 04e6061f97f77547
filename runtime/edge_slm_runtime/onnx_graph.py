"""Reads an ONNX graph without the onnx package, and nothing in it that ours do not have.

The messages are those of onnx.proto. A field that is not in `_MESSAGES` is refused, and so are
subgraphs, functions and tensors as attributes: what is read here is all that there is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from edge_slm_runtime.onnx_paths import read_varint

Dims = tuple[int | str, ...]
FLOAT, UINT8, INT32, INT64 = 1, 2, 6, 7
OPSETS = {"": 20, "com.microsoft": 1}  # what operators and attributes mean
ITEM_BYTES = {FLOAT: 4, UINT8: 1, INT32: 4, INT64: 8}


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor's element type and shape; names stand for sizes that differ from call to call."""

    element: int
    shape: Dims


@dataclass(frozen=True, slots=True)
class Constant:
    """value: its shape has numbers only. raw: the bytes, where they are in the graph; else
    they are `bytes` of the file `location` from `offset` on."""

    value: Value
    raw: bytes | None
    location: str = ""
    offset: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    """op: its domain before it, where that is not ONNX's own."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, int | float]


@dataclass(frozen=True, slots=True)
class Graph:
    nodes: tuple[Node, ...]
    constants: Mapping[str, Constant]
    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]


# message → {number: (name, kind)}; kind: a message, or one of int, float, bytes, text, ignored.
# Names that end with * may come several times.
_MESSAGES: Mapping[str, Mapping[int, tuple[str, str]]] = {
    "Model": {
        1: ("ir_version", "int"),
        2: ("producer_name", "ignored"),
        3: ("producer_version", "ignored"),
        7: ("graph", "Graph"),
        8: ("opset*", "Opset"),
    },
    "Opset": {1: ("domain", "text"), 2: ("version", "int")},
    "Graph": {
        1: ("node*", "Node"),
        2: ("name", "ignored"),
        5: ("initializer*", "Tensor"),
        11: ("input*", "ValueInfo"),
        12: ("output*", "ValueInfo"),
    },
    "Node": {
        1: ("input*", "text"),
        2: ("output*", "text"),
        3: ("name", "ignored"),
        4: ("op_type", "text"),
        5: ("attribute*", "Attribute"),
        7: ("domain", "text"),
    },
    "Attribute": {
        1: ("name", "text"),
        2: ("f", "float"),
        3: ("i", "int"),
        20: ("type", "int"),
    },
    "Tensor": {
        1: ("dims*", "int"),
        2: ("data_type", "int"),
        8: ("name", "text"),
        9: ("raw_data", "bytes"),
        13: ("external*", "Entry"),
        14: ("data_location", "int"),
    },
    "Entry": {1: ("key", "text"), 2: ("value", "text")},
    "ValueInfo": {1: ("name", "text"), 2: ("type", "Type")},
    "Type": {1: ("tensor_type", "TensorType")},
    "TensorType": {1: ("elem_type", "int"), 2: ("shape", "Shape")},
    "Shape": {1: ("dim*", "Dim")},
    "Dim": {1: ("value", "int"), 2: ("param", "text")},
}
_WIRE = {"int": 0, "float": 5}  # all other kinds are of wire type 2


def read_graph(model: bytes) -> Graph:
    """The graph of a serialised ONNX ModelProto. Raises ValueError, and KeyError
    for what is missing or of another kind."""
    found = _message(memoryview(model), "Model")
    opsets = _named((opset.get("domain", ""), opset["version"]) for opset in found["opset"])
    if opsets != OPSETS:
        raise ValueError(f"operator sets {opsets}")
    graph = found["graph"]
    return Graph(
        tuple(map(_node, graph["node"])),
        _named((tensor["name"], _constant(tensor)) for tensor in graph["initializer"]),
        _named((value["name"], _value(value["type"])) for value in graph["input"]),
        _named((value["name"], _value(value["type"])) for value in graph["output"]),
    )


def _message(data: memoryview, kind: str) -> dict[str, Any]:
    fields = _MESSAGES[kind]
    found: dict[str, Any] = {name[:-1]: [] for name, _ in fields.values() if name.endswith("*")}
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        name, inner = fields.get(number, ("", ""))
        if not name or wire != _WIRE.get(inner, 2):
            raise ValueError(f"field {number} of {kind}")
        if wire == 0:
            content, at = read_varint(data, at)
            value: Any = content - (1 << 64) if content >> 63 else content
        else:
            size, at = (4, at) if wire == 5 else read_varint(data, at)
            if size > len(data) - at:
                raise ValueError("cut short")
            value, at = _content(data[at : at + size], inner), at + size
        if name.endswith("*"):
            found[name[:-1]].append(value)
        elif name in found:
            raise ValueError(f"{kind} has two of {name}")
        else:
            found[name] = value
    return found


def _content(data: memoryview, kind: str) -> Any:
    if kind in _MESSAGES:
        return _message(data, kind)
    if kind == "float":
        return struct.unpack("<f", data)[0]
    return bytes(data).decode("utf-8") if kind == "text" else bytes(data)


def _node(node: dict[str, Any]) -> Node:
    domain = node.get("domain", "")
    attributes = []
    for attribute in node["attribute"]:
        kind = {1: "f", 2: "i"}[attribute["type"]]
        if {"f", "i"} & {*attribute} != {kind}:
            raise ValueError(f"attribute {attribute['name']}")
        attributes.append((attribute["name"], attribute[kind]))
    return Node(
        f"{domain}.{node['op_type']}" if domain else node["op_type"],
        tuple(node["input"]),
        tuple(node["output"]),
        _named(attributes),
    )


def _constant(tensor: dict[str, Any]) -> Constant:
    """Raises ValueError when it has not as many bytes as its shape says."""
    name, shape = tensor["name"], tuple(tensor["dims"])
    if not all(1 <= size < 1 << 40 for size in shape):
        raise ValueError(f"{name} has shape {shape}")
    expected = prod(shape) * ITEM_BYTES[tensor["data_type"]]
    value = Value(tensor["data_type"], shape)
    if tensor.get("data_location", 0) == 0 and not tensor["external"]:
        if len(tensor["raw_data"]) != expected:
            raise ValueError(f"{name} has {len(tensor['raw_data'])} bytes, not {expected}")
        return Constant(value, tensor["raw_data"], bytes=expected)
    place = _named((entry["key"], entry["value"]) for entry in tensor["external"])
    if {*place} != {"location", "offset", "length"} or "raw_data" in tensor:
        raise ValueError(f"{name} is kept at {place}")
    if not all(place[key].isascii() and place[key].isdigit() for key in ("offset", "length")):
        raise ValueError(f"{name} is kept at {place}")
    if tensor.get("data_location") != 1 or int(place["length"]) != expected:
        raise ValueError(f"{name} has {place['length']} bytes, not {expected}")
    return Constant(value, None, place["location"], int(place["offset"]), expected)


def _value(kind: dict[str, Any]) -> Value:
    tensor = kind["tensor_type"]
    shape = []
    for dim in tensor["shape"]["dim"]:
        if len(dim) != 1:
            raise ValueError("a size that is not known")
        shape.extend(dim.values())
    return Value(tensor["elem_type"], tuple(shape))


def _named(pairs: Any) -> dict[str, Any]:
    """A dictionary; raises ValueError when a name comes twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found
