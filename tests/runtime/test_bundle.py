"""Each attack on a bundle is refused with its own error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_slm_runtime import load, read_manifest, verify
from edge_slm_runtime.bundle import MANIFEST, FileEntry, Manifest, file_entry, manifest_digest
from edge_slm_runtime.errors import (
    BundleError,
    BundleNotFound,
    FileAltered,
    FileMissing,
    FileTruncated,
    FileUnlisted,
    ManifestAltered,
    ManifestInvalid,
    PathEscape,
    SchemaVersionUnsupported,
    SymlinkRefused,
)
from edge_slm_runtime.onnx_paths import external_locations


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to attack."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as its author could: with a fitting digest."""
    data = json.loads((bundle / MANIFEST).read_text("utf-8"))
    change(data)
    data["digest"] = manifest_digest(data)
    (bundle / MANIFEST).write_text(json.dumps(data), "utf-8")


def test_untouched_bundle_verifies(tiny_bundle: Path) -> None:
    manifest = verify(tiny_bundle)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert verify(tiny_bundle, hashes=False) == manifest


def test_peak_memory_is_optional(bundle: Path) -> None:
    def write(data: dict[str, Any]) -> None:
        for variant in data["variants"]:
            del variant["peak_rss_mb"]
        data["variants"][0]["peak_rss_mb"] = 81.5

    rewrite(bundle, write)
    manifest = verify(bundle)
    assert [v.peak_rss_mb for v in manifest.variants] == [81.5, *[None] * 6]
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_missing_file(bundle: Path) -> None:
    (bundle / "onnx-int8/model.data").unlink()
    with pytest.raises(FileMissing, match=r"onnx-int8/model\.data"):
        load(bundle)


def test_truncated_file(bundle: Path) -> None:
    path = bundle / "onnx-int8/model.data"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FileTruncated, match=r"onnx-int8/model\.data"):
        load(bundle)


@pytest.mark.parametrize(
    ("engine", "file"),
    [("onnxruntime", "onnx-int8/model.data"), ("numba", "numba-int8/model.safetensors")],
)
def test_flipped_byte(bundle: Path, engine: str, file: str) -> None:
    data = bytearray((bundle / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / file).write_bytes(data)
    with pytest.raises(FileAltered, match=file):
        load(bundle, engine)


def test_load_reads_what_it_loads_and_verify_everything(bundle: Path) -> None:
    path = bundle / "onnx-fp32/model.data"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    load(bundle, "onnxruntime", "int8", threads=1).close()
    for wrong in (lambda: verify(bundle), lambda: load(bundle, "onnxruntime", "fp32")):
        with pytest.raises(FileAltered, match=r"onnx-fp32/model\.data"):
            wrong()


@pytest.mark.parametrize("name", ["extra.txt", "onnx-int8/.hidden", "new/deep/file"])
def test_unlisted_file(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("x")
    with pytest.raises(FileUnlisted, match=name):
        load(bundle)


def test_pipe_is_refused_and_not_opened(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    os.mkfifo(bundle / "tokenizer.json")  # opening it would wait for ever
    with pytest.raises(FileUnlisted, match="not a plain file"):
        load(bundle)


def test_symlink_to_an_equal_file(bundle: Path, tmp_path: Path) -> None:
    moved = tmp_path / "tokenizer.json"
    (bundle / "tokenizer.json").rename(moved)
    (bundle / "tokenizer.json").symlink_to(moved)
    with pytest.raises(SymlinkRefused, match=r"tokenizer\.json"):
        load(bundle)


def test_symlink_to_an_equal_folder(bundle: Path, tmp_path: Path) -> None:
    (bundle / "onnx-int8").rename(tmp_path / "elsewhere")
    (bundle / "onnx-int8").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SymlinkRefused, match="onnx-int8"):
        load(bundle)


def test_symlink_as_manifest(bundle: Path, tmp_path: Path) -> None:
    (bundle / MANIFEST).rename(tmp_path / MANIFEST)
    (bundle / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(SymlinkRefused):
        load(bundle)


@pytest.mark.parametrize(
    "path",
    [
        *("../evil", "a/../../evil", "/etc/passwd", "a//b", "./a", "", "a/"),
        *("C:/evil", "c:evil", "a\\b", "\\\\host\\share", "a\x00b", "a:stream"),
    ],
)
def test_listed_path_outside(bundle: Path, path: str) -> None:
    entry = {"sha256": "0" * 64, "size": 0}
    rewrite(bundle, lambda data: data["files"].update({path: entry}))
    with pytest.raises(PathEscape):
        load(bundle)


def test_variant_outside(bundle: Path) -> None:
    rewrite(bundle, lambda data: data["variants"][0].update(path="../elsewhere"))
    with pytest.raises(PathEscape):
        load(bundle)


def test_variant_whose_model_is_not_listed(bundle: Path) -> None:
    rewrite(bundle, lambda data: data["variants"][0].update(path="nowhere"))
    with pytest.raises(FileMissing, match="nowhere/model"):
        load(bundle)


def test_altered_manifest(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text("utf-8")
    (bundle / MANIFEST).write_text(text.replace('"layers": 2', '"layers": 3'), "utf-8")
    with pytest.raises(ManifestAltered):
        load(bundle)


@pytest.mark.parametrize("version", [None, 0, 2, "1", True])
def test_unknown_schema_version(bundle: Path, version: object) -> None:
    rewrite(bundle, lambda data: data.update(schema_version=version))
    with pytest.raises(SchemaVersionUnsupported):
        load(bundle)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"a": NaN, "schema_version": 1}', '"\ud800"']
)
def test_manifest_that_is_no_manifest(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ManifestInvalid):
        load(bundle)


@pytest.mark.parametrize(
    "key", ["name", "model", "command", "variants", "goldens", "provenance", "files"]
)
def test_manifest_without_a_part_or_with_a_wrong_one(bundle: Path, key: str) -> None:
    rewrite(bundle, lambda data: data.update({key: 7}))
    with pytest.raises(ManifestInvalid):
        load(bundle)
    rewrite(bundle, lambda data: data.pop(key))
    with pytest.raises(ManifestInvalid):
        load(bundle)


def test_manifest_with_a_duplicate_variant(bundle: Path) -> None:
    rewrite(bundle, lambda data: data["variants"].append(data["variants"][0]))
    with pytest.raises(ManifestInvalid, match="twice"):
        load(bundle)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("variants", {"fidelity": "x"}),
        ("variants", {"fidelity": {"top1": "high"}}),
        ("variants", {"peak_rss_mb": "100"}),
        ("variants", {"peak_rss_mb": -0.5}),
        ("variants", {"peak_rss_mb": True}),
        ("variants", {"bytes": -1}),
        ("goldens", {"command": {"task": "poem"}}),
        ("goldens", {"command": {"words": "3"}}),
    ],
)
def test_manifest_with_a_wrong_value(bundle: Path, part: str, change: dict[str, Any]) -> None:
    rewrite(bundle, lambda data: data[part][0].update(change))
    with pytest.raises(ManifestInvalid):
        load(bundle)


@pytest.mark.parametrize(
    ("engine", "change"),
    [
        ("onnxruntime", {"layers": 3}),
        ("onnxruntime", {"heads": 2}),
        ("onnxruntime", {"vocab_size": 418}),
        ("ctranslate2", {"vocab_size": 418}),
        ("onnxruntime", {"vocab_size": 300}),
        *(("numba", {"layers": layers}) for layers in (0, 1, 3, 10**12)),
        *(("numba", {"heads": heads}) for heads in (0, 2, 3, 10**30)),
        *(("numba", {"width": width}) for width in (0, 32, 128)),
        *(("numba", {"positions": positions}) for positions in (0, 64, 200, 10**30)),
        *(("numba", {"vocab_size": vocab_size}) for vocab_size in (300, 418, 10**30)),
    ],
)
def test_another_model_than_the_manifest_says(
    bundle: Path, engine: str, change: dict[str, Any]
) -> None:
    rewrite(bundle, lambda data: data["model"].update(change))
    with pytest.raises(
        ManifestInvalid, match=r"the manifest|the model|the tensor|has levels|cannot be|malformed"
    ):
        load(bundle, engine)


def test_a_file_that_cannot_be_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        read_manifest(Path("x" * 5000))

    def removed_meanwhile(path: Path) -> FileEntry:
        path.unlink()
        return file_entry(path)

    monkeypatch.setattr("edge_slm_runtime.integrity.file_entry", removed_meanwhile)
    with pytest.raises(BundleError, match=r"bundle/.* cannot be read: No such file"):
        verify(bundle)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleNotFound, match=r"manifest\.json"):
        read_manifest(tmp_path)


# -- external data of ONNX models --------------------------------------------


def point_weights_at(bundle: Path, location: str) -> None:
    """What a malicious publisher could do: every digest fits."""
    import onnx

    path = bundle / "onnx-int8/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    entry = file_entry(path)
    listed = {"sha256": entry.sha256, "size": entry.size}
    rewrite(bundle, lambda data: data["files"].update({"onnx-int8/model.onnx": listed}))


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("../../secret", PathEscape),
        ("/etc/passwd", PathEscape),
        ("*/_ORT_MEM_ADDR_/*/../..", PathEscape),
        ("*/_ORT_MEM_ADDR_/*", FileMissing),  # onnxruntime's mark for a bare memory address
        ("not-listed.data", FileMissing),
    ],
)
def test_weights_outside_the_bundle(bundle: Path, location: str, error: type[Exception]) -> None:
    point_weights_at(bundle, location)
    with pytest.raises(error, match="keeps weights at"):
        load(bundle, "onnxruntime")
    with pytest.raises(error, match="keeps weights at"):
        load(bundle, "onnxruntime", verify=False)


@pytest.mark.parametrize(
    "model",
    [
        b"\xba\x80\x80\x80\x10\x00",  # tag of field 7 with bit 32 set: C++ reads it as field 7
        b"\x00\x00",  # field 0
        b"\x3a\x80\x00",  # a size of two bytes where one does
        b"\x08" + b"\xff" * 9 + b"\x7f",  # more than 64 bits
    ],
)
def test_numbers_that_parsers_read_differently(model: bytes) -> None:
    with pytest.raises(ValueError, match=r"tag|longer"):
        external_locations(model)


def test_model_that_is_no_protobuf(bundle: Path) -> None:
    path = bundle / "onnx-int8/model.onnx"
    path.write_bytes(b"\xff" * 100)
    entry = file_entry(path)
    listed = {"sha256": entry.sha256, "size": entry.size}
    rewrite(bundle, lambda data: data["files"].update({"onnx-int8/model.onnx": listed}))
    with pytest.raises(ManifestInvalid, match="not an ONNX model"):
        load(bundle, "onnxruntime")


def test_locations_are_found_wherever_a_tensor_can_hide() -> None:
    import onnx
    from onnx import helper

    def tensor(location: str) -> Any:
        made = onnx.TensorProto(name=location, dims=[1], data_type=1)
        made.data_location = onnx.TensorProto.EXTERNAL
        made.external_data.add(key="offset", value="0")
        made.external_data.add(key="location", value=location)
        return made

    sparse = onnx.SparseTensorProto(values=tensor("values"), indices=tensor("indices"))
    inner = helper.make_graph([], "inner", [], [], [tensor("subgraph")])
    node = helper.make_node("If", [], [], then_branch=inner, value=tensor("attribute"))
    node.attribute.append(helper.make_attribute("many", [tensor("list")]))
    node.attribute.append(helper.make_attribute("sparse", sparse))
    function = onnx.FunctionProto(name="f")
    function.node.append(helper.make_node("Constant", [], [], value=tensor("function")))
    graph = helper.make_graph([node], "g", [], [], [tensor("initialiser")])
    model = helper.make_model(graph, functions=[function])
    training = model.training_info.add()
    training.initialization.CopyFrom(helper.make_graph([], "t", [], [], [tensor("training")]))
    assert external_locations(model.SerializeToString()) == {
        *("values", "indices", "subgraph", "attribute", "list"),
        *("function", "initialiser", "training"),
    }
