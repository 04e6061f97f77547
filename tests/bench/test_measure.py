"""Figures come from fresh processes, and every sample is kept."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from edge_slm_bench.machine import machine
from edge_slm_bench.measure import measure_variant, request_of
from edge_slm_bench.report import speed_table
from edge_slm_bench.speed import measure_interleaved
from edge_slm_runtime import read_manifest
from edge_slm_runtime.errors import BundleNotFound, UnknownTask, VariantNotFound


@pytest.mark.parametrize("variant", ["onnx-int8", "ctranslate2-int8"])
def test_a_measurement_keeps_its_samples(variant: str, tiny_bundle: Path) -> None:
    request = {"request": "a fox", "task": "image", "words": 3}
    cell = measure_variant(
        tiny_bundle, variant, threads=1, samples=3, new_tokens=16, requests=[request, request]
    )
    assert cell.threads == 1
    assert cell.ttft_ms.keys() == {16, 64}  # 256 do not fit into 128 positions
    assert all(len(samples) == 3 for samples in cell.ttft_ms.values())
    assert len(cell.tpot_ms) == 3
    assert min(*cell.tpot_ms, *cell.load_ms, *cell.ttft_ms[16]) > 0
    assert [g["asked"]["words"] for g in cell.generations] == [3, 3]
    stated = {v.name: v.bytes for v in read_manifest(tiny_bundle).variants}
    assert cell.disk_bytes == stated[variant]
    # A fresh interpreter with an engine, not this one with torch's neighbours.
    assert 20 < cell.peak_rss_mb[0] < 400
    assert json.loads(json.dumps(cell.as_dict()))["medians"]["tpot_ms"] > 0


def test_prompts_have_the_length_that_is_timed(tiny_bundle: Path) -> None:
    from edge_slm_runtime import Request, load

    with load(tiny_bundle) as slm:
        for tokens in (16, 64):
            text = request_of(tokens, lambda t: len(slm.check(Request(t)).prompt))
            assert len(slm.check(Request(text)).prompt) == tokens


@given(st.integers(2, 80))
def test_request_of_never_exceeds(tokens: int) -> None:
    def count(text: str) -> int:
        return 1 + sum(1 + len(word) // 3 for word in text.split())

    assert tokens - 1 <= count(request_of(tokens, count)) <= tokens


def test_interleaved_cells_take_turns_and_merge(tiny_bundle: Path) -> None:
    order: list[str] = []
    names = ["onnx-int8", "onnx-int4"]
    cells = measure_interleaved(
        [(tiny_bundle, name) for name in names],
        repetitions=2,
        threads=1,
        new_tokens=8,
        done=order.append,
    )
    assert order == [f"{tiny_bundle.name}/{name}" for name in names * 2]
    assert [cell.variant for cell in cells] == names
    assert all(len(cell.load_ms) == len(cell.peak_rss_mb) == 2 for cell in cells)
    assert all(len(cell.tpot_ms) == 6 for cell in cells)
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(speed_table(cells))
    assert "onnx-int4" in console.export_text()


def test_errors_of_the_child_are_those_of_the_parent(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(VariantNotFound, match="onnx-int8"):
        measure_variant(tiny_bundle, "onnx-int2")
    with pytest.raises(BundleNotFound):
        measure_variant(tmp_path, "onnx-int8")
    with pytest.raises(UnknownTask, match="poem"):
        measure_variant(
            tiny_bundle, "onnx-int8", samples=1, requests=[{"request": "a", "task": "poem"}]
        )


def test_speed_as_a_module(tiny_bundle: Path) -> None:
    command = [sys.executable, "-m", "edge_slm_bench.speed", str(tiny_bundle)]
    options = ["--repetitions", "1", "--threads", "1", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    data = json.loads(done.stdout)
    assert len(data["cells"]) == len(read_manifest(tiny_bundle).variants)
    missing = subprocess.run(
        [*command[:3], "/nowhere"], check=False, capture_output=True, text=True
    )
    assert missing.returncode == 4
    assert missing.stderr.startswith("error[bundle_not_found]: ")


def test_the_machine_is_named() -> None:
    record = machine()
    assert record.cpu
    assert 1 <= record.usable_cores <= record.cores
    assert {"onnxruntime", "tokenizers"} <= record.packages.keys()
