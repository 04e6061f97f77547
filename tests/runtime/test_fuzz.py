"""Damaged bundles whose sums are made to fit: an answer, or an error of ours; never a crash, a
hang or another error.

What our own checks refuse is not given to an engine; what they allow is, in a process of its own.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
from damage import VALUES, bytes_damaged, fuzz, json_bytes, json_damaged, refused, tried
from isolation import answer, outcome

from edge_slm_runtime import read_manifest
from edge_slm_runtime.bundle import MANIFEST, file_entry, manifest_digest
from edge_slm_runtime.engines.ct2_file import check_model
from edge_slm_runtime.engines.weights import Weights
from edge_slm_runtime.errors import EdgeSlmError
from edge_slm_runtime.integrity import verify_structure
from edge_slm_runtime.onnx_check import check_onnx

pytestmark = pytest.mark.slow


class Victim:
    """A copy of a bundle, one file of which is damaged at a time."""

    def __init__(self, original: Path, copy: Path) -> None:
        self.path = Path(shutil.copytree(original, copy))
        self.manifest: dict[str, Any] = json.loads((original / MANIFEST).read_text("utf-8"))
        self.decoder = read_manifest(original).model
        self.content = {file: (original / file).read_bytes() for file in self.manifest["files"]}

    @contextmanager
    def holding(self, file: str, content: bytes) -> Iterator[Path]:
        """The path of `file`, which has another content meanwhile, and is listed so."""
        path = self.path / file
        path.write_bytes(tried(file, content))
        entry = file_entry(path)
        files = {**self.manifest["files"], file: {"sha256": entry.sha256, "size": entry.size}}
        data = {**self.manifest, "files": files}
        data["digest"] = manifest_digest(data)
        (self.path / MANIFEST).write_text(json.dumps(data), "utf-8")
        try:
            yield path
        finally:
            path.write_bytes(self.content[file])


@pytest.fixture(scope="module")
def victim(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return Victim(tiny_bundle, tmp_path_factory.mktemp("victim") / "bundle")


@fuzz("manifest", 200)
def test_any_manifest(victim: Victim, seed: str) -> str:
    choice = random.Random(seed)
    data = json_damaged(choice, victim.manifest)
    if isinstance(data, dict):
        try:
            data["digest"] = manifest_digest(data)
        except (EdgeSlmError, UnicodeEncodeError):
            data["digest"] = "x"
    (victim.path / MANIFEST).write_bytes(tried(MANIFEST, json_bytes(choice, data)))
    engine, precision = choice.choice(
        [
            *[("auto", "auto"), ("onnxruntime", "int8"), ("onnxruntime", "fp32")],
            *[("numba", "int8"), ("numba", "int4"), ("ctranslate2", "int8")],
        ]
    )
    memory = choice.choice([None, None, 200.0, 1e6, 1.0])
    return refused(verify_structure, victim.path) or outcome(
        answer, victim.path, engine, precision, memory
    )


# -- ONNX ----------------------------------------------------------------------------

SIZES = (0, -1, 1, 2, 3, 4, 7, 8, 16, 32, 100, 128, 4096, 10**6, 2**31 - 1, 2**31, 2**40, 2**62)
PLACES = ("0", "1", "64", "4096", "-1", "99999999", str(2**63 - 1), str(2**64 - 1), "abc", "")
OPERATORS = (
    *("MatMul", "Gather", "Loop", "Identity", "Add", "Cast", "GroupQueryAttention", "Mul"),
    *("MatMulNBits", "QuantizeLinear", "Reshape", "ConstantOfShape", "Split", "Slice", "Tanh"),
)


def damage_node(choice: random.Random, graph: Any) -> None:
    node = choice.choice([node for node in graph.node if node.attribute])
    attribute = choice.choice(node.attribute)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = choice.choice([*SIZES, -(2**63)])
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = choice.choice([0.0, -1.0, float("nan"), float("inf"), 1e38])


def damage_constant(choice: random.Random, graph: Any) -> None:
    tensor = choice.choice(graph.initializer)
    if tensor.dims and choice.random() < 0.5:
        tensor.dims[choice.randrange(len(tensor.dims))] = choice.choice(SIZES)
    elif tensor.external_data:
        choice.choice(tensor.external_data).value = choice.choice(PLACES)
    else:
        tensor.data_type = choice.choice([1, 2, 3, 6, 7, 10, 11, 13, 16])


def damage_wiring(choice: random.Random, graph: Any) -> None:
    node = choice.choice(graph.node)
    others = [choice.choice(graph.initializer).name, choice.choice(graph.node).output[0]]
    kind = choice.randrange(4)
    if kind < 2 and node.input:
        place = choice.randrange(len(node.input))
        node.input[place] = choice.choice([*others, "", "input_ids", "position_ids"])
    elif kind == 2:
        node.op_type = choice.choice(OPERATORS)
    else:
        at, other = choice.randrange(len(graph.node)), choice.randrange(len(graph.node))
        graph.node[at].CopyFrom(graph.node[other])


def damage_interface(choice: random.Random, graph: Any) -> None:
    tensor = choice.choice([*graph.input, *graph.output]).type.tensor_type
    if tensor.shape.dim and choice.random() < 0.7:
        size = choice.choice(tensor.shape.dim)
        if choice.random() < 0.3:
            size.dim_param = choice.choice(["n", "B", "S", "T"])
        else:
            size.dim_value = choice.choice(SIZES)
    else:
        tensor.elem_type = choice.choice([1, 6, 7, 8, 10, 11])


@fuzz("onnx", 200)
def test_any_onnx_graph(victim: Victim, seed: str) -> str:
    choice = random.Random(seed)
    precision = choice.choice(["fp32", "int8", "int4"])
    file = f"onnx-{precision}/model.onnx"
    content = victim.content[file]
    if choice.random() < 0.3:
        content = bytes_damaged(choice, content)
    else:
        model = onnx.load_from_string(content)
        kinds = [damage_node, damage_node, damage_constant, damage_wiring, damage_interface]
        for _ in range(choice.choice([1, 1, 2])):
            choice.choice(kinds)(choice, model.graph)
        content = model.SerializeToString()
    data = f"onnx-{precision}/model.data"
    sizes = {"model.data": len(victim.content[data])}
    tried(file, content)
    if refusal := refused(check_onnx, content, victim.decoder, sizes, errors=ValueError):
        return refusal
    with victim.holding(file, content):
        return outcome(answer, victim.path, "onnxruntime", precision)


# -- other files ---------------------------------------------------------------------


@fuzz("ctranslate2", 80)
def test_any_ctranslate2_file(victim: Victim, seed: str) -> str:
    choice = random.Random(seed)
    file = choice.choice(["model.bin"] * 6 + ["vocabulary.json", "config.json"])
    file = f"ctranslate2-int8/{file}"
    content = victim.content[file]
    if file.endswith("json"):
        content = json_bytes(choice, json_damaged(choice, json.loads(content)))
    elif choice.random() < 0.4:
        content = bytes_damaged(choice, content)
    else:  # where a name is, and the sizes behind it
        at = choice.choice([i for i in range(len(content)) if content.startswith(b"decoder/", i)])
        at = max(0, at - 16)
        content = content[:at] + bytes_damaged(choice, content[at : at + 80]) + content[at + 80 :]
    with victim.holding(file, content) as path:
        refusal = (
            ""
            if file.endswith("json")
            else refused(check_model, path, victim.decoder, "int8", errors=ValueError)
        )
        return refusal or outcome(answer, victim.path, "ctranslate2", "int8")


STEPS: tuple[Any, ...] = (
    *({"type": "ByteLevel"}, {"type": "Sequence", "normalizers": []}, {"type": "Whitespace"}),
    *({"type": "Digits", "individual_digits": True}, {"type": "UnicodeScripts"}, {"type": "NFC"}),
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    *(
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}
        for regex in ("(a+)+$", "(", "[a-z]*", "(?i:a|ab)(?!c)", "\\p{L}+|\\s", "x{1,99999}")
        for behavior in ("Removed", "Isolated", "MergedWithNext")
    ),
)


@fuzz("tokenizer", 80)
def test_any_tokenizer(victim: Victim, seed: str) -> str:
    choice, file = random.Random(seed), "tokenizer.json"
    content = victim.content[file]
    if choice.random() < 0.3:
        content = bytes_damaged(choice, content)
    else:
        data = json_damaged(choice, json.loads(content), (*VALUES, *STEPS, *STEPS))
        model = data.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if vocabulary and isinstance(vocabulary, dict) and choice.random() < 0.3:
            ids = [0, 3, 5000, 2**31, 2**32 - 1]
            vocabulary[choice.choice(list(vocabulary))] = choice.choice(ids)
        content = json_bytes(choice, data)
    with victim.holding(file, content):
        return outcome(answer, victim.path, "onnxruntime", "int8")


@fuzz("numba-header", 80)
def test_any_numba_header(victim: Victim, seed: str) -> str:
    choice = random.Random(seed)
    precision = choice.choice(["int8", "int4"])
    file = f"numba-{precision}/model.safetensors"
    content = victim.content[file]
    end = 8 + int.from_bytes(content[:8], "little")
    kinds = ("F32", "F16", "U8", [0, 0], [0, 64], [64, 0], [-64, 64], [2**62, 4], "nan", "0x10")
    header = json_bytes(choice, json_damaged(choice, json.loads(content[8:end]), VALUES + kinds))
    if choice.random() < 0.05:
        header = bytes_damaged(choice, header)
    header += b" " * (-(8 + len(header)) % 64)
    length = choice.choice([len(header)] * 30 + [0, 2**63, len(content)])
    changed = length.to_bytes(8, "little") + header + content[end:]
    with victim.holding(file, changed) as path:
        refusal = refused(Weights, path, victim.decoder)
        return refusal or outcome(answer, victim.path, "numba", precision)
