"""Checks an ONNX graph before onnxruntime sees it: operators, attributes, and every shape.

onnxruntime checks most of a graph, but its fused operators trust some of what it says and read
or write beyond their memory. So a graph may only hold the operators that our converter writes
for GPT-2 and the Llama family, and each value must have the shape that its operator needs. The
wiring is free: what has these shapes can compute nonsense, and nothing worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.onnx_graph import FLOAT, INT32, INT64, UINT8, Graph, Node, Value, read_graph

FUSED = "com.microsoft."
Values = Sequence[Value | None]  # None: an optional input that is left out
Rule = Callable[["_Checker", Node, Values], Sequence[Value]]


def check_onnx(model: bytes, decoder: Decoder, sizes: Mapping[str, int]) -> None:
    """Raises ValueError for a graph that is not one of `decoder`, or does more.

    sizes: bytes of the files beside it, by name.
    """
    try:
        _check(read_graph(model), decoder, sizes)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None


def _check(graph: Graph, decoder: Decoder, sizes: Mapping[str, int]) -> None:
    for name, constant in graph.constants.items():
        if constant.raw is None:
            there = sizes.get(constant.location, 0)
            if constant.offset + constant.bytes > there:
                raise ValueError(f"{name} is beyond the end of {constant.location}")
    _Checker(graph, decoder).run()


def _interface(decoder: Decoder) -> tuple[dict[str, Value], dict[str, Value]]:
    """Inputs and outputs: rows B, new tokens S, capacity of the cache T."""
    cache = Value(FLOAT, ("B", decoder.kv_heads, "T", decoder.head_width))
    inputs = {
        "input_ids": Value(INT64, ("B", "S")),
        "position_ids": Value(INT64, ("B", "S")),
        "seqlens_k": Value(INT32, ("B",)),
        "total_sequence_length": Value(INT32, ()),
    }
    outputs = {"logits": Value(FLOAT, ("B", 1, decoder.vocab_size))}
    for i in range(decoder.layers):
        for part in ("key", "value"):
            inputs[f"past_key_values.{i}.{part}"] = cache
            outputs[f"present.{i}.{part}"] = cache
    return inputs, outputs


class _Checker:
    """Goes through the nodes in their order and follows the shapes of all values."""

    def __init__(self, graph: Graph, decoder: Decoder) -> None:
        self.graph, self.decoder = graph, decoder
        self.cached: set[tuple[str, str]] = set()
        constants = {name: constant.value for name, constant in graph.constants.items()}
        self.values: dict[str, Value] = {**constants, **graph.inputs}
        if len(self.values) != len(constants) + len(graph.inputs):
            raise ValueError("an input has the name of a constant")

    def run(self) -> None:
        inputs, outputs = _interface(self.decoder)
        if self.graph.inputs != inputs or self.graph.outputs != outputs:
            raise ValueError("its inputs and outputs are not those of the model")
        for node in self.graph.nodes:
            self._node(node)
        for name, value in outputs.items():
            if self.values.get(name) != value:
                raise ValueError(f"{name} is not computed")

    def _node(self, node: Node) -> None:
        if node.op not in _RULES:
            raise ValueError(f"operator {node.op}")
        rule, least, most, attributes = _RULES[node.op]
        inputs = [self.values[name] if name else None for name in node.inputs]
        if not least <= len(inputs) <= most or None in inputs[:1]:
            _refuse(node, "inputs")
        if unknown := {*node.attributes} - {*attributes}:
            _refuse(node, f"attribute {unknown.pop()}")
        for name, allowed in attributes.items():
            if name in node.attributes and not allowed(node.attributes[name]):
                _refuse(node, f"{name} {node.attributes[name]}")
        found = rule(self, node, inputs)
        named = [name for name in node.outputs if name]
        if len(named) > len(found):
            _refuse(node, "outputs")
        for name, value in zip(named, found, strict=False):
            if name in self.values:
                raise ValueError(f"{name} is computed twice")
            self.values[name] = value

    def number(self, name: str) -> int:
        """A constant of a single int64, which lies in the graph."""
        constant = self.graph.constants.get(name)
        if not constant or constant.raw is None or constant.value != Value(INT64, (1,)):
            raise ValueError(f"{name} is not a constant number")
        return int.from_bytes(constant.raw, "little", signed=True)


def _refuse(node: Node, what: str) -> NoReturn:
    raise ValueError(f"{node.op} has other {what} than ours")


def _want(node: Node, found: Value | None, *shape: int | str, element: int = FLOAT) -> None:
    if found != Value(element, shape):
        _refuse(node, f"shapes ({found})")


def _width(node: Node, x: Value | None) -> int:
    """Of rows [B, S or 1, width] of floats."""
    if x is None or x.element != FLOAT or len(x.shape) != 3 or x.shape[0] != "B":
        _refuse(node, f"shapes ({x})")
    if x.shape[1] not in ("S", 1) or not isinstance(x.shape[2], int):
        _refuse(node, f"shapes ({x})")
    return x.shape[2]


def _with_width(x: Value | None, width: int) -> Value:
    assert x is not None
    return Value(x.element, (*x.shape[:2], width))


def _matrix(node: Node, x: Value | None) -> tuple[int, int]:
    found = x.shape if x and x.element == FLOAT else ()
    if len(found) != 2 or not isinstance(found[0], int) or not isinstance(found[1], int):
        _refuse(node, f"shapes ({x})")
    return found[0], found[1]


def _elementwise(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    """Of one, or of several of a shape; a second one may be a vector."""
    x, *others = inputs
    width = _width(node, x)
    for other in others:
        if other != x:
            _want(node, other, width)
    return [_with_width(x, width)]


def _same(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    if inputs[0] != inputs[1]:
        _refuse(node, "shapes")
    return [_with_width(inputs[0], _width(node, inputs[0]))]


def _norm(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    width = _width(node, inputs[0])
    for weights in inputs[1:]:
        _want(node, weights, width)
    return [_with_width(inputs[0], width)]


def _skip_norm(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    if inputs[0] != inputs[1]:
        _refuse(node, "shapes")
    if len(node.outputs) not in (1, 4) or any(node.outputs[1:3]):
        _refuse(node, "outputs")
    (found,) = _norm(checker, node, (inputs[0], *inputs[2:]))
    return [found, found]


def _gather(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    if node.attributes.get("axis"):
        width = _width(node, inputs[0])
        if checker.number(node.inputs[1]) != -1:
            _refuse(node, "position")
        return [Value(FLOAT, ("B", 1, width))]
    rows, columns = _matrix(node, inputs[0])
    _indices(checker, node, inputs[1], rows)
    return [Value(FLOAT, ("B", "S", columns))]


def _indices(checker: _Checker, node: Node, ids: Value | None, rows: int) -> None:
    """Token ids or positions, each of which has a row."""
    _want(node, ids, "B", "S", element=INT64)
    positions, vocab_size = checker.decoder.positions, checker.decoder.vocab_size
    if rows < (positions if node.inputs[1] == "position_ids" else vocab_size):
        _refuse(node, f"rows ({rows})")


def _gather_blocks(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    weight, ids, scale = inputs
    rows, blocks = _matrix(node, scale)
    columns = blocks * int(node.attributes["block_size"])
    _indices(checker, node, ids, rows)
    _want(node, weight, rows, columns, element=UINT8)
    return [Value(FLOAT, ("B", "S", columns))]


def _slice(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    start, end, axis = (checker.number(name) for name in node.inputs[1:])
    if (start, axis) != (0, -1) or not 0 < end <= _width(node, inputs[0]):
        _refuse(node, f"ends ({start}, {end}, {axis})")
    return [_with_width(inputs[0], end)]


def _split(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    width = _width(node, inputs[0])
    if width % 2 or len(node.outputs) != 2 or "" in node.outputs or len(node.attributes) != 2:
        _refuse(node, "parts")
    return [_with_width(inputs[0], width // 2)] * 2


def _product(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    shape = _matrix(node, inputs[1])
    width, outputs = reversed(shape) if node.attributes.get("transB") else shape
    if width != _width(node, inputs[0]):
        _refuse(node, "shapes")
    return [_with_width(inputs[0], outputs)]


def _block_product(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    sizes = {name: int(value) for name, value in node.attributes.items()}
    outputs, bits, size = sizes["N"], sizes["bits"], sizes["block_size"]
    if not 0 < outputs < 1 << 40 or sizes["K"] != _width(node, inputs[0]):
        _refuse(node, "shapes")
    blocks = -(-sizes["K"] // size)
    _want(node, inputs[1], outputs, blocks, size * bits // 8, element=UINT8)
    _want(node, inputs[2], outputs, blocks)
    if len(inputs) == 4:
        _want(node, inputs[3], outputs, -(-blocks * bits // 8), element=UINT8)
    return [_with_width(inputs[0], outputs)]


def _attention(checker: _Checker, node: Node, inputs: Values) -> Sequence[Value]:
    d, rotary = checker.decoder, checker.decoder.position == "rotary"
    heads = node.attributes["num_heads"], node.attributes["kv_num_heads"]
    caches = node.inputs[3:5], node.outputs[1:]
    layer = node.inputs[3].removesuffix(".key").removeprefix("past_key_values.")
    parts = [
        f"{way}.{layer}.{part}"
        for way in ("past_key_values", "present")
        for part in ("key", "value")
    ]
    if heads != (d.heads, d.kv_heads) or [*caches[0], *caches[1]] != parts:
        _refuse(node, "heads or caches")
    if node.inputs[1:3] != ("", "") or node.inputs[5:7] != ("seqlens_k", "total_sequence_length"):
        _refuse(node, "inputs")
    if len(inputs) != (10 if rotary else 7) or node.attributes.get("do_rotary", 0) != rotary:
        _refuse(node, "positions")
    if rotary:
        for table in inputs[7:9]:
            rows, width = _matrix(node, table)
            if rows < d.positions or width * 2 != d.head_width:
                _refuse(node, f"shapes ({table})")
        if node.inputs[9] != "position_ids":
            _refuse(node, "positions")
    _want(node, inputs[0], "B", "S", d.attention_width + 2 * d.kv_width)
    cache = Value(FLOAT, ("B", d.kv_heads, "T", d.head_width))
    return [Value(FLOAT, ("B", "S", d.attention_width)), cache, cache]


def _one_of(*allowed: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value in allowed


def _real(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _whole(value: Any) -> bool:
    return type(value) is int


_EPSILON = {"epsilon": _real}
_NORM = {"axis": _one_of(-1), **_EPSILON}
_BLOCKS = _one_of(16, 32, 64, 128, 256)
# operator → (rule, least inputs, most inputs, attribute → whether a value may be)
_RULES: Mapping[str, tuple[Rule, int, int, Mapping[str, Callable[[Any], bool]]]] = {
    "Add": (_elementwise, 2, 2, {}),
    "Mul": (_same, 2, 2, {}),
    "Sigmoid": (_elementwise, 1, 1, {}),
    "Relu": (_elementwise, 1, 1, {}),
    "Tanh": (_elementwise, 1, 1, {}),
    "Identity": (_elementwise, 1, 1, {}),
    f"{FUSED}Gelu": (_elementwise, 1, 1, {}),
    f"{FUSED}FastGelu": (_norm, 1, 2, {}),
    f"{FUSED}BiasGelu": (_norm, 2, 2, {}),
    "Gather": (_gather, 2, 2, {"axis": _one_of(0, 1)}),
    f"{FUSED}GatherBlockQuantized": (
        _gather_blocks,
        3,
        3,
        {
            "bits": _one_of(8),
            "block_size": _BLOCKS,
            "gather_axis": _one_of(0),
            "quantize_axis": _one_of(1),
        },
    ),
    "Slice": (_slice, 4, 4, {}),
    "Split": (_split, 1, 1, {"axis": _one_of(-1), "num_outputs": _one_of(2)}),
    "LayerNormalization": (_norm, 3, 3, _NORM),
    "SimplifiedLayerNormalization": (_norm, 2, 2, _NORM),
    f"{FUSED}SkipLayerNormalization": (_skip_norm, 4, 5, _EPSILON),
    f"{FUSED}SkipSimplifiedLayerNormalization": (_skip_norm, 3, 4, _EPSILON),
    f"{FUSED}FusedMatMul": (_product, 2, 2, {"transB": _one_of(0, 1)}),
    f"{FUSED}MatMulNBits": (
        _block_product,
        3,
        4,
        {
            "K": _whole,
            "N": _whole,
            "bits": _one_of(4, 8),
            "block_size": _BLOCKS,
            "accuracy_level": _one_of(0, 1, 2, 3, 4),
        },
    ),
    f"{FUSED}GroupQueryAttention": (
        _attention,
        7,
        10,
        {
            "num_heads": _whole,
            "kv_num_heads": _whole,
            "scale": lambda value: isinstance(value, float) and math.isfinite(value),
            "do_rotary": _one_of(0, 1),
        },
    ),
}
