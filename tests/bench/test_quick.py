"""What fits a device, measured in real processes within the seconds given."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edge_slm_bench.quick import chosen_variants, measure, requests_of, thread_counts
from edge_slm_runtime import PromptForm, load, read_manifest
from edge_slm_runtime.errors import BadSetting, FileAltered, VariantNotFound


def test_threads_double_up_to_what_the_runtime_takes() -> None:
    assert thread_counts(1) == (1,)
    assert thread_counts(6) == (1, 2, 4, 6)
    assert thread_counts(8) == (1, 2, 4, 8)
    assert thread_counts()[0] == 1


def test_every_row_is_measured_in_turn(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    variants = chosen_variants(manifest, ["onnx-int8", "ctranslate2-int8"])
    *earlier, (rows, done, total) = measure(str(tiny_bundle), manifest, variants, [1, 2], 120, 2)
    assert [total for _, _, total in earlier] == [4, 4, 4, 4, 4, 8, 8, 8]
    assert [row.reason for row in earlier[0][0]] == ["not measured"] * 4
    assert (done, total) == (8, 8)
    assert [(row.variant, row.threads) for row in rows] == [
        ("onnx-int8", 1),
        ("onnx-int8", 2),
        ("ctranslate2-int8", 1),
        ("ctranslate2-int8", 2),
    ]
    assert {len(row.peak_rss_mb) for row in rows} == {2}  # processes
    for row in rows:
        assert not row.reason
        assert set(row.answers_ms) == {16, 32}  # 64 words do not fit into 128 positions
        counts = {len(row.load_ms), *map(len, row.answers_ms.values())}
        assert counts == {2}
        assert 20 < row.memory_mb < 400
        assert min(row.latency_ms(16), *row.ttft_ms, *row.tpot_ms, *row.load_ms) > 0
        assert row.disk_bytes == next(v.bytes for v in variants if v.name == row.variant)


def test_the_requests_are_within_what_the_model_can(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    requests = requests_of(manifest)
    with load(tiny_bundle) as slm:
        for words, request in requests.items():
            answer = slm.generate(**request)
            assert answer.asked.words == words
            assert not answer.warnings
    # With a task that training saw at all of the lengths, where there is one.
    every = dict.fromkeys(manifest.prompt.grammar.axis("words").values, 99)
    schema = replace(
        manifest.prompt.grammar,
        support={"image": {"words": {"8": 99}}, "video": {"words": every}, "title": {"words": {}}},
    )
    told = requests_of(replace(manifest, prompt=PromptForm.commanded(schema)))
    assert {request["task"] for request in told.values()} == {"video"}
    with pytest.raises(BadSetting, match="40 positions"):
        requests_of(replace(manifest, model=replace(manifest.model, positions=40)))


def test_an_engine_that_is_not_there_is_a_row(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ctranslate2.py").write_text("raise ImportError('no libgomp')\n", "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    manifest = read_manifest(tiny_bundle)
    variants = chosen_variants(manifest, ["ctranslate2-int8", "onnx-int4"])
    (missing, measured), *_ = list(
        measure(str(tiny_bundle), manifest, variants, [1], 60, rounds=1)
    )[-1]
    assert not missing.measured
    assert "no libgomp" in missing.reason
    assert measured.measured


def test_without_time_rows_say_so(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    start = time.monotonic()
    *_, (rows, _, _) = measure(str(tiny_bundle), manifest, manifest.variants, [1, 2], 0.05)
    assert [row.reason for row in rows] == ["no time left: give more --seconds"] * len(rows)
    assert time.monotonic() - start < 30  # not one process ran to its end


def test_what_is_wrong_with_all_rows_is_raised(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = read_manifest(bundle)
    with pytest.raises(VariantNotFound, match="onnx-int2"):
        chosen_variants(manifest, ["onnx-int2"])
    file = bundle / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(FileAltered, match=r"tokenizer\.json"):
        list(measure(str(bundle), manifest, manifest.variants, [1], 60))
