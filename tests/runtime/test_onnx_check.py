"""What may be in an ONNX graph: the operators, attributes and shapes that our converter writes."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from edge_slm_runtime import EdgeSlmError, load, read_manifest
from edge_slm_runtime.bundle import Manifest, file_entry
from edge_slm_runtime.engines.ct2_file import check_model
from edge_slm_runtime.onnx_check import check_onnx

from .test_bundle import rewrite

PRECISIONS = ("fp32", "int8", "int4")


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return read_manifest(tiny_bundle)


def graph_of(bundle: Path, precision: str) -> Any:
    return onnx.load(str(bundle / f"onnx-{precision}/model.onnx"), load_external_data=False)


def check(model: Any, manifest: Manifest, precision: str) -> None:
    size = manifest.files[f"onnx-{precision}/model.data"].size
    check_onnx(model.SerializeToString(), manifest.model, {"model.data": size})


def first(model: Any, op: str) -> Any:
    return next(node for node in model.graph.node if node.op_type == op)


def attribute(node: Any, name: str) -> Any:
    return next(one for one in node.attribute if one.name == name)


def stored(model: Any) -> Any:
    """A matrix kept in the file of weights."""
    return next(t for t in model.graph.initializer if t.external_data and len(t.dims) == 3)


def place(tensor: Any, key: str) -> Any:
    return next(entry for entry in tensor.external_data if entry.key == key)


def add_function(model: Any) -> None:
    model.functions.append(onnx.FunctionProto(name="f", domain="d"))


def add_node(op: str, **attributes: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.graph.node.insert(0, helper.make_node(op, ["wpe.weight"], ["new"], **attributes))

    return change


def sub_graph(model: Any) -> None:
    inner = helper.make_graph([], "inner", [], [])
    add_node("If", then_branch=inner, else_branch=inner)(model)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a function": add_function,
    "a subgraph": sub_graph,
    "another operator": add_node("Loop"),
    "an operator of another domain": add_node("Identity", domain="ai.example"),
    "a known operator under another name": lambda m: setattr(first(m, "Add"), "op_type", "Cast"),
    "another attribute": lambda m: first(m, "Gather").attribute.append(
        helper.make_attribute("surprise", 1)
    ),
    "a tensor as attribute": lambda m: first(m, "Add").attribute.append(
        helper.make_attribute("value", m.graph.initializer[0])
    ),
    "heads": lambda m: setattr(attribute(first(m, "GroupQueryAttention"), "num_heads"), "i", 8),
    "no heads": lambda m: setattr(attribute(first(m, "GroupQueryAttention"), "num_heads"), "i", 0),
    "another cache": lambda m: first(m, "GroupQueryAttention").input.__setitem__(
        3, "past_key_values.1.key"
    ),
    "inputs": lambda m: setattr(attribute(first(m, "MatMulNBits"), "K"), "i", 4096),
    "outputs": lambda m: setattr(attribute(first(m, "MatMulNBits"), "N"), "i", 1 << 31),
    "no outputs": lambda m: setattr(attribute(first(m, "MatMulNBits"), "N"), "i", -1),
    "a block": lambda m: setattr(attribute(first(m, "MatMulNBits"), "block_size"), "i", 0),
    "bits": lambda m: setattr(attribute(first(m, "MatMulNBits"), "bits"), "i", 2),
    "an epsilon": lambda m: setattr(
        attribute(first(m, "SkipLayerNormalization"), "epsilon"), "f", float("nan")
    ),
    "an axis": lambda m: first(m, "Gather").attribute.append(helper.make_attribute("axis", 5)),
    "a bias of another width": lambda m: first(m, "Add").input.__setitem__(1, "ln_f.bias"),
    "a norm of another width": lambda m: first(m, "SkipLayerNormalization").input.__setitem__(
        2, "h.0.mlp.c_fc.bias"
    ),
    "an unknown value": lambda m: first(m, "Add").input.__setitem__(1, "nothing"),
    "a later value": lambda m: first(m, "Add").input.__setitem__(0, "logits"),
    "more rows": lambda m: stored(m).dims.__setitem__(0, 10**6),
    "rows below none": lambda m: stored(m).dims.__setitem__(0, -1),
    "another type": lambda m: setattr(stored(m), "data_type", onnx.TensorProto.FLOAT),
    "a type that is none": lambda m: setattr(stored(m), "data_type", 77),
    "beyond the file": lambda m: setattr(place(stored(m), "offset"), "value", "99999999"),
    "before the file": lambda m: setattr(place(stored(m), "offset"), "value", "-64"),
    "no number": lambda m: setattr(place(stored(m), "offset"), "value", "٣"),
    "a short length": lambda m: setattr(place(stored(m), "length"), "value", "1"),
    "a checksum": lambda m: stored(m).external_data.add(key="checksum", value="0"),
    "an input of another shape": lambda m: setattr(
        m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 7
    ),
    "an input of another type": lambda m: setattr(
        m.graph.input[0].type.tensor_type, "elem_type", 1
    ),
    "one input more": lambda m: m.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
    "a cache that is not written": lambda m: setattr(m.graph.output[1], "name", "present.9.key"),
    "operators of another time": lambda m: setattr(m.opset_import[0], "version", 7),
}


def test_our_graphs_are_allowed(tiny_bundle: Path, manifest: Manifest) -> None:
    for precision in PRECISIONS:
        check(graph_of(tiny_bundle, precision), manifest, precision)


@pytest.mark.parametrize("name", CHANGES)
def test_another_graph_is_refused(name: str, tiny_bundle: Path, manifest: Manifest) -> None:
    model = graph_of(tiny_bundle, "int8")
    CHANGES[name](model)
    with pytest.raises(ValueError, match=r"."):
        check(model, manifest, "int8")


def test_a_table_with_fewer_rows_than_positions(tiny_bundle: Path, manifest: Manifest) -> None:
    longer = replace(manifest, model=replace(manifest.model, positions=129))
    with pytest.raises(ValueError, match="Gather has other rows"):
        check(graph_of(tiny_bundle, "fp32"), longer, "fp32")


def test_any_bytes_of_a_graph(tiny_bundle: Path, manifest: Manifest) -> None:
    """Refused by a ValueError, or still a graph of the model."""
    original = (tiny_bundle / "onnx-int8/model.onnx").read_bytes()
    sizes = {"model.data": manifest.files["onnx-int8/model.data"].size}
    choice, refused = random.Random(3), 0
    for _ in range(300):
        content = bytearray(original)
        for _ in range(choice.choice([1, 2, 8])):
            content[choice.randrange(len(content))] = choice.choice([0, 1, 0x7F, 0x80, 0xFF])
        try:
            check_onnx(bytes(content), manifest.model, sizes)
        except ValueError:
            refused += 1
    assert refused > 200


def test_a_refused_graph_is_a_damaged_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    model = graph_of(bundle, "int8")
    CHANGES["heads"](model)
    path = bundle / "onnx-int8/model.onnx"
    path.write_bytes(model.SerializeToString())
    entry = file_entry(path)
    listed = {"sha256": entry.sha256, "size": entry.size}
    rewrite(bundle, lambda data: data["files"].update({"onnx-int8/model.onnx": listed}))
    with pytest.raises(EdgeSlmError, match="is not a graph of this model"):
        load(bundle, "onnxruntime", "int8")


# -- CTranslate2 ---------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_our_ctranslate2_files_are_allowed(
    tiny_bundle: Path, manifest: Manifest, precision: str
) -> None:
    variant = next(
        v for v in manifest.variants if (v.engine, v.precision) == ("ctranslate2", precision)
    )
    check_model(tiny_bundle / variant.path / "model.bin", manifest.model, precision)


def scalar(content: bytes, name: str, kind: str, value: float) -> bytes:
    """With another value of a variable of one number."""
    at = content.index(name.encode() + b"\0") + len(name) + 1 + 1 + 1 + 4  # rank, type, bytes
    size = struct.calcsize(kind)
    return content[:at] + struct.pack("<" + kind, value) + content[at + size :]


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda c: b"",
    "cut": lambda c: c[:-1],
    "cut in the middle": lambda c: c[: len(c) // 2],
    "more": lambda c: c + b"\0",
    "a version": lambda c: b"\7" + c[1:],
    "many variables": lambda c: (
        c.replace(b"\x08\0\0\0", b"\x08\0\0\0\xff\xff\xff\xff"[:4], 1)[:37] + b"\xff" * 4 + c[41:]
    ),
    "heads": lambda c: scalar(c, "decoder/num_heads", "h", 3),
    "no heads": lambda c: scalar(c, "decoder/num_heads", "h", 0),
    "an activation": lambda c: scalar(c, "decoder/activation", "b", 99),
    "alibi": lambda c: scalar(c, "decoder/alibi", "b", 1),
    "a scale": lambda c: scalar(
        c, "decoder/layer_0/self_attention/queries_scale", "f", float("nan")
    ),
    "a shape": lambda c: c.replace(struct.pack("<II", 417, 64), struct.pack("<II", 64, 417), 1),
    "another name": lambda c: c.replace(b"linear_1/bias", b"linear_1/bios", 1),
    "a name twice": lambda c: c.replace(b"ffn/linear_1/bias", b"ffn/linear_0/bias", 1),
    "an alias of another shape": lambda c: (
        c[: c.rindex(b"decoder/embeddings/weight")]
        + b"decoder/layer_norm/gamma\0\0"
        + c[c.rindex(b"decoder/embeddings/weight") + 26 :]
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_another_ctranslate2_file_is_refused(
    name: str, tiny_bundle: Path, manifest: Manifest, tmp_path: Path
) -> None:
    original = (tiny_bundle / "ctranslate2-int8/model.bin").read_bytes()
    changed = FILES[name](original)
    assert changed != original
    (tmp_path / "model.bin").write_bytes(changed)
    with pytest.raises(ValueError, match=r"."):
        check_model(tmp_path / "model.bin", manifest.model, "int8")
