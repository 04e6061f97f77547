"""Finds where an ONNX model keeps its external weights, without the onnx package.

A minimal walk over the protobuf wire format (protobuf.dev/programming-guides/encoding)
along the fields of onnx.proto that can hold a TensorProto. It errs on the side
of seeing too much: every `location` of every tensor is reported, used or not.
"""

from __future__ import annotations

from collections.abc import Iterator

# message → {field number: message of that field}, from onnx.proto
_SCHEMA: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {
        **{5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph"},
        **{22: "Sparse", 23: "Sparse"},
    },
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_DEPTH_LIMIT = 64  # nested subgraphs; ours have none


def external_locations(model: bytes) -> set[str]:
    """Every external-data location in a serialised ONNX ModelProto.

    Raises ValueError when `model` is not protobuf.
    """
    return set(_walk(memoryview(model), "Model", 0))


def _walk(data: memoryview, message: str, depth: int) -> Iterator[str]:
    if depth > _DEPTH_LIMIT:
        raise ValueError("nested too deeply")
    inner = _SCHEMA[message]
    for number, value in _fields(data):
        child = inner.get(number)
        if child == "Entry":
            yield from _location(value)
        elif child:
            yield from _walk(value, child, depth + 1)


def _location(entry: memoryview) -> Iterator[str]:
    pairs = [(number, bytes(value)) for number, value in _fields(entry)]
    if (_KEY, b"location") in pairs:
        for number, value in pairs:
            if number == _VALUE:
                yield value.decode("utf-8")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, content) of the length-delimited fields; skips the numbers."""
    at, end = 0, len(data)
    while at < end:
        tag, at = read_varint(data, at)
        if tag >> 32 or not tag >> 3:  # C++ parsers drop the upper bits and see another field
            raise ValueError(f"tag {tag:#x}")
        kind = tag & 7
        if kind == 0:
            _, at = read_varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = read_varint(data, at)
            if at + size <= end:
                yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind}")
    if at != end:
        raise ValueError("cut short")


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends). No writer pads with zero bytes, and parsers differ on them."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            if value >> 64 or (byte == 0 and shift > 7):
                raise ValueError("a number longer than it need be")
            return value, at
    raise ValueError("cut short")
