"""What the numba engine's kernels are told is in memory, is there."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import Tally, marked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_slm_runtime import read_manifest
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.engines.base import EngineOptions
from edge_slm_runtime.engines.numba_engine import NumbaEngine
from edge_slm_runtime.engines.weights import Weights
from edge_slm_runtime.errors import EngineError, ManifestInvalid
from edge_slm_runtime.kernels import layout as t
from edge_slm_runtime.panels import LANES, UNIT

Header = dict[str, Any]


@pytest.fixture(scope="module")
def facts(tiny_bundle: Path) -> Decoder:
    return read_manifest(tiny_bundle).model


@pytest.fixture(scope="module")
def contents(tiny_bundle: Path) -> dict[str, tuple[Header, bytes]]:
    """Header and data, by precision."""
    found = {}
    for precision in ("int8", "int4"):
        raw = (tiny_bundle / f"numba-{precision}/model.safetensors").read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        found[precision] = json.loads(raw[8:end]), raw[end:]
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "numba-int8"
    folder.mkdir()
    return folder / "model.safetensors"


def write(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def regions(weights: Weights) -> Iterator[tuple[int, int]]:
    """(address, bytes) of everything that the kernels read by the table."""
    table, decoder = weights.table, weights.decoder
    vector = -(-decoder.width // UNIT) * UNIT * 4
    if decoder.position == "learned":
        yield table[t.POSITION_TABLE], decoder.positions * decoder.width * 4
    norms = [t.FINAL_WEIGHT, t.FINAL_BIAS]
    matrices = [t.EMBEDDING, t.LM_HEAD]
    for i in range(decoder.layers):
        start = t.FIRST_LAYER + t.LAYER * i
        norms += [start + n for n in (t.NORM_1, t.NORM_1_BIAS, t.NORM_2, t.NORM_2_BIAS)]
        matrices += [start + m for m in (t.LAYER_QKV, t.LAYER_OUT, t.LAYER_UP, t.LAYER_DOWN)]
    for norm in norms:
        if decoder.norm == "layer" or table[norm]:
            yield table[norm], vector
    for place in matrices:
        m = table[place : place + t.MATRIX]
        lines = m[t.PANELS] * m[t.BLOCKS] * LANES
        yield m[t.LEVEL], lines * m[t.SIZE] * m[t.BITS] // 8
        yield m[t.SCALE], lines * 2
        if m[t.BITS] == 4:
            yield m[t.ZERO], lines
        if place > t.LM_HEAD:
            yield m[t.BIAS], m[t.PANELS] * LANES * 4


def all_in_place(weights: Weights) -> bool:
    """Everything that the kernels read lies in the file, on the boundary of a vector."""
    start, end = weights._data.ctypes.data, weights._data.ctypes.data + len(weights._data)
    return all(
        start <= address and address % 64 == 0 and address + size <= end
        for address, size in regions(weights)
    )


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_was_written_is_read(
    tiny_bundle: Path, facts: Decoder, contents: dict[str, Any], precision: str
) -> None:
    header, data = contents[precision]
    weights = Weights(tiny_bundle / f"numba-{precision}/model.safetensors", facts)
    assert all_in_place(weights)
    start = weights._data.ctypes.data
    read = {(int(address) - start, int(size)) for address, size in regions(weights)}
    stored = [e["data_offsets"] for name, e in header.items() if name != "__metadata__"]
    assert read == {(first, last - first) for first, last in stored}
    assert weights._data[: len(data)].tobytes() == data


def test_a_file_that_is_none(file: Path, facts: Decoder) -> None:
    for raw in (b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8, b"\x01" + b"\0" * 7, b"\xff" * 5000):
        file.write_bytes(raw)
        with pytest.raises(EngineError, match="numba-int8 cannot be read"):
            Weights(file, facts)
    file.unlink()
    with pytest.raises(EngineError, match="No such file"):
        Weights(file, facts)


def test_data_that_are_not_on_a_boundary(
    file: Path, facts: Decoder, contents: dict[str, Any]
) -> None:
    header, data = contents["int8"]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # without the eight bytes before
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(EngineError, match="do not begin at a multiple of 64 bytes"):
        Weights(file, facts)


def test_a_header_that_is_too_long(file: Path, facts: Decoder, contents: dict[str, Any]) -> None:
    header, data = contents["int8"]
    write(file, json.dumps(header).encode() + b" " * (17 << 20), data)
    with pytest.raises(EngineError, match="a header of"):
        Weights(file, facts)


@pytest.mark.parametrize("cut", [1, 63, 64, 5000, 10**9])
def test_a_file_that_is_cut_short(
    file: Path, facts: Decoder, contents: dict[str, Any], cut: int
) -> None:
    header, data = contents["int8"]
    write(file, header, data[: max(0, len(data) - cut)])
    with pytest.raises(ManifestInvalid, match="the tensor"):
        Weights(file, facts)


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"7", b"null", b"[]", b'"x"', b"{}", b"\xff\xfe", b'{"__metadata__": 7}'),
        *(b'{"__metadata__": null}', b'{"__metadata__": {}}', b"[" * 100_000),
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"9" * 5000,  # more digits than Python reads
    ],
    ids=lambda text: str(text[:24]),
)
def test_a_header_that_is_none(file: Path, facts: Decoder, text: bytes) -> None:
    write(file, text, b"\0" * 64)
    with pytest.raises(EngineError, match="cannot be read"):
        Weights(file, facts)


@pytest.mark.parametrize(
    "change",
    [
        *({"activation": value} for value in ("swish", "", None, 3, [])),
        *({"layer_norm_epsilon": value} for value in ("x", None, [], "nan", "-1", "inf", "1e999")),
    ],
    ids=str,
)
def test_settings_that_are_none(
    file: Path, facts: Decoder, contents: dict[str, Any], change: dict[str, Any]
) -> None:
    header, data = copy.deepcopy(contents["int8"])
    header["__metadata__"].update(change)
    write(file, header, data)
    with pytest.raises(EngineError, match="cannot be read"):
        Weights(file, facts)


NAMES = (
    *("wte.levels", "wte.scale", "wpe", "ln_f.weight", "h.1.ln_2.bias", "h.0.attn.c_attn.bias"),
    *("h.0.attn.c_attn.levels", "h.1.mlp.c_proj.scale", "h.1.mlp.c_fc.levels"),
)
WRONG: tuple[Any, ...] = (None, 7, "x", [], {}, -1, True, 1.5, 2**70, [1, [2]], ["a", "b", "c"])


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_not_what_it_must_be(
    file: Path, facts: Decoder, contents: dict[str, Any], name: str
) -> None:
    original, data = contents["int8"]
    start, end = original[name]["data_offsets"]
    shape, dtype = original[name]["shape"], original[name]["dtype"]
    size = len(data)
    entries: list[Any] = [*WRONG]
    for key in ("dtype", "shape", "data_offsets"):
        entries += [original[name] | {key: wrong} for wrong in WRONG]
        entries.append({k: v for k, v in original[name].items() if k != key})
    entries += [
        original[name] | change
        for change in (
            {"dtype": "F32" if dtype == "U8" else "U8"},
            {"dtype": "BF16"},
            {"dtype": "F32" if dtype == "F16" else "F16"},
            {"shape": [*shape, 1]},
            {"shape": [2 * shape[0], *shape[1:]]},
            {"shape": [-1, *shape[1:]]},
            {"shape": [-shape[0], *shape[1:-1], -shape[-1]]},
            {"shape": [0, *shape[1:]]},
            {"shape": [float(n) for n in shape]},
            {"data_offsets": [start + 1, end + 1]},
            {"data_offsets": [start + 4, end + 4]},
            {"data_offsets": [start, end - 4]},
            {"data_offsets": [start, end + 64]},
            {"data_offsets": [end, start]},
            {"data_offsets": [size // 64 * 64, size // 64 * 64 + end - start]},
            {"data_offsets": [start + 2**63, end + 2**63]},
            {"data_offsets": [start - 2**64, end - 2**64]},
            {"data_offsets": [float(start), float(end)]},
            {"data_offsets": [start, end, end]},
            {"data_offsets": [start - size, end - size]},
        )
    ]
    for entry in entries:
        write(file, original | {name: entry}, data)
        with pytest.raises(ManifestInvalid, match=r"the tensor|has levels"):
            Weights(file, facts)
    write(file, {k: v for k, v in original.items() if k != name}, data)
    with pytest.raises(ManifestInvalid, match=r"the tensor|has no bias"):
        Weights(file, facts)


def test_levels_of_another_shape(file: Path, facts: Decoder, contents: dict[str, Any]) -> None:
    """As many bytes, taken otherwise: other blocks, panels, bits."""
    header, data = contents["int8"]
    name = "h.0.mlp.c_fc.levels"  # 16 panels, one block of 64
    whole = header[name]["shape"]
    assert whole == [16, 1, 64 * 16]
    for shape in ([16, 2, 512], [32, 1, 512], [8, 1, 2048], [8, 2, 1024], [1, 16, 1024]):
        write(file, header | {name: header[name] | {"shape": shape}}, data)
        with pytest.raises(ManifestInvalid, match=r"the tensor|has levels"):
            Weights(file, facts)
    zero = {"dtype": "U8", "shape": header["wte.scale"]["shape"], "data_offsets": [0, 448]}
    write(file, header | {"wte.zero": zero}, data)  # the embedding is never of 4 bits
    with pytest.raises(ManifestInvalid, match="has levels"):
        Weights(file, facts)


SIZES = st.sampled_from([0, 1, 2, 3, 4, 16, 32, 63, 64, 65, 128, 417, 448, 10**6, 10**18, 10**30])


NAMED = ("layers", "heads", "width", "vocab_size", "positions")


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries(dict.fromkeys(NAMED, SIZES)))
def test_any_facts(tiny_bundle: Path, facts: Decoder, sizes: dict[str, int]) -> None:
    path = tiny_bundle / "numba-int8/model.safetensors"
    for name, size in sizes.items():
        for told in (replace(facts, **{name: size}), replace(facts, **sizes)):
            try:
                told.check()
                weights = Weights(path, told)
            except (ManifestInvalid, ValueError):
                continue
            assert all_in_place(weights)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["int8", "int4"]),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_a_header_with_any_bytes_changed(
    tmp_path_factory: pytest.TempPathFactory,
    facts: Decoder,
    contents: dict[str, Any],
    precision: str,
    changes: list[tuple[int, int]],
) -> None:
    """It is refused, or what the kernels will read is there."""
    header, data = contents[precision]
    text = bytearray(json.dumps(header).encode())
    for place, value in changes:
        text[place % len(text)] = value
    file = tmp_path_factory.mktemp("any") / "model.safetensors"
    write(file, bytes(text), data)
    try:
        weights = Weights(file, facts)
    except (EngineError, ManifestInvalid):
        return
    assert all_in_place(weights)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_any_numbers_are_computed_with(
    file: Path, facts: Decoder, contents: dict[str, Any], precision: str
) -> None:
    """Of no use, but no crash: infinite, not a number, the largest."""
    header, data = contents[precision]
    for value in (np.nan, np.inf, -3e38, 1e-44):
        changed = bytearray(data)
        for name, entry in header.items():
            if entry.get("dtype") == "F32" and name != "wpe":
                part = slice(*entry["data_offsets"])
                count = (part.stop - part.start) // 4
                changed[part] = np.full(count, value, np.float32).tobytes()
        write(file, header, bytes(changed))
        engine = NumbaEngine(file.parent, facts, EngineOptions(threads=2))
        step = engine.new_pass(engine.new_cache(1).array, 9, 9)
        step.run([range(70, 79)], [0])
        engine.close()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded by mprotect")
@marked("numba")
def test_no_kernel_touches_what_is_beyond_its_memory(tmp_path: Path) -> None:
    """Half of the files fit their model; a check that lets others pass ends in a signal."""
    script, tally, tried = Path(__file__).with_name("guard_pages.py"), Tally("numba", 300), 0
    while tried < tally.count:
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), str(tally.count), tally.seed, str(tried)],
            capture_output=True,
            text=True,
            check=False,
        )
        ended = done.stdout.split()
        tally.found.update(ended)
        tried += len(ended)
        if done.returncode:
            failure = {-signal.SIGALRM: "hangs", 1: "raw errors"}.get(done.returncode, "crashes")
            file = tmp_path / "model.safetensors"
            tally.failed(failure, tried, done.stderr[-800:], file.name, file.read_bytes())
            tried += 1
    tally.end()
    assert tally.found["read"] > tally.count / 3
