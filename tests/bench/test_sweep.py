"""The sweep: its cells, their turns, and what becomes of those that fail."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm_bench.bench import run_bench
from edge_slm_bench.evaluation import assess
from edge_slm_bench.metrics.examples import Example
from edge_slm_bench.prompts import prompts_of, request_of
from edge_slm_bench.results import Cell, CellResult, ProcessSample, Report, Timing, with_sample
from edge_slm_bench.runners import Prompt, Spec, TimedAnswer, open_runner
from edge_slm_bench.scenarios import run_scenario
from edge_slm_bench.sweep import Model, Settings, Sweep, endurance, model_of, plan
from edge_slm_runtime import Request, load, read_manifest
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import BadSetting, BundleNotFound, DataError, EngineError

pytestmark = pytest.mark.slow

QUICK = Settings(threads=(1,), prompt_tokens=(16,), new_tokens=(6,), rounds=2, repetitions=2)
EXAMPLES = [
    Example("a cabin", Command("image", 5), "a cosy cabin in snow"),
    Example("a fox", Command("image", 4), "a fox at night"),
    Example("misty forest", Command("video", 6), "slow drone shot over misty forest"),
]


@pytest.fixture
def model(tiny_bundle: Path) -> Model:
    return model_of(tiny_bundle, ["onnx-int8", "onnx-fp32"])


def test_prompts_have_their_length_and_differ(tiny_bundle: Path) -> None:
    with load(tiny_bundle) as slm:
        words = slm.schema.axis("words").edges[-1] - 1
        for tokens in (16, 64):
            prompts = prompts_of(tiny_bundle, tokens, 5)
            others = prompts_of(tiny_bundle, tokens, 5, other=True)
            assert [one.request for one in others] == [one.request for one in prompts]
            assert len({prompt.ids for prompt in prompts + others}) == 10
            assert {prompt.words for prompt in prompts} == {words}
            for prompt in prompts + others:
                asked = Request(prompt.request, words=prompt.words, max_new_tokens=1)
                assert slm.check(asked).prompt == prompt.ids
                assert len(prompt.ids) == tokens
    with pytest.raises(BadSetting, match="no prompt of 2 tokens"):
        prompts_of(tiny_bundle, 2, 1)


@given(st.integers(2, 80), st.integers(0, 20))
def test_request_of_never_exceeds(tokens: int, turn: int) -> None:
    def count(text: str) -> int:
        return 1 + sum(1 + len(word) // 3 for word in text.split())

    found = count(request_of(tokens, count, turn))
    assert found <= max(tokens, count("cabin"))
    assert found >= tokens - 1


def test_the_cells_are_the_product_of_the_axes(model: Model) -> None:
    settings = replace(
        QUICK,
        threads=(1, 2),
        prompt_tokens=(16, 125),
        scenarios=("single-stream", "variations", "offline", "server"),
        batches=(2, 4),
        concurrencies=(1, 2),
        rates=(5.0,),
    )
    missing = replace(model, missing={"llama.cpp-F16": "not here"})
    cells = list(plan(missing, settings))
    assert len({cell for cell, _ in cells}) == len(cells) == 2 * 2 * (1 + 1 + 2 + 2) * 3
    reasons = {cell.variant: why for cell, why in cells if cell.prompt_tokens == 16}
    assert reasons == {"onnx-int8": "", "onnx-fp32": "", "llama.cpp-F16": "not here"}
    long = {why for cell, why in cells if cell.prompt_tokens == 125 and "llama" not in cell.variant}
    assert long == {"125 + 6 tokens do not fit 128"}


def test_a_bench_measures_everything_and_can_be_read_again(model: Model, tmp_path: Path) -> None:
    settings = replace(
        QUICK,
        scenarios=("single-stream", "variations", "offline", "server"),
        batches=(3,),
        concurrencies=(2,),
        rates=(200.0,),
        server_requests=4,
    )
    seen: list[str] = []
    report = run_bench(
        [model],
        settings,
        command="edge-slm bench tiny",
        examples={model.name: EXAMPLES},
        endurance_requests=20,
        journal=tmp_path / "samples.jsonl",
        report=lambda done, total, what: seen.append(f"{done}/{total} {what}"),
    )
    assert seen[0].startswith("1/20 ")
    assert seen[-1].startswith("20/20 ")
    assert seen[0].split()[-1] != seen[1].split()[-1]  # cells take turns
    for result in report.cells:
        assert result.status in ("ok", "flagged")
        assert [sample.round for sample in result.samples] == [0, 1]
        assert not result.samples[1].cold
        figures = report.figures(result)
        assert figures.load_ms is None or figures.load_ms > 0
        assert (figures.peak_rss_mb or 0) > 20
        assert all((sample.bandwidth or 0) > 1e8 for sample in result.samples)
        timings = [t for sample in result.samples for t in sample.timings]
        if result.cell.scenario == "offline":
            assert {t.new_tokens for t in timings} == {3 * 6}
            assert figures.ttft_ms is None
        else:
            assert {t.new_tokens for t in timings} == {6}
            assert all(len(t.steps_ms) == 5 and min(t.steps_ms) > 0 for t in timings)
            assert 0 < (figures.ttft_ms or 0) <= (figures.latency_p50_ms or 0)
        assert (figures.goodput is None) == (result.cell.scenario != "server")
    lines = (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 2 * len(report.cells)
    by_name = {q.variant: q for q in report.quality}
    assert by_name["onnx-fp32"].fidelity is None
    assert by_name["onnx-int8"].reference == "onnx-fp32"
    assert (by_name["onnx-int8"].fidelity or {})["positions"] > 10
    assert [asked for asked, _ in by_name["onnx-int8"].words] == [5, 4, 6]
    assert set((by_name["onnx-int8"].differing or {}).values()) == {0}
    assert {e.variant for e in report.endurance} == {"onnx-int8", "onnx-fp32"}
    assert all(e.rss_mb[-1][0] == 20 for e in report.endurance)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report.as_dict()), encoding="utf-8")
    again = Report.read(file)
    assert json.dumps(again.as_dict()) == json.dumps(report.as_dict())


def test_a_file_that_is_no_report_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(DataError, match="cannot read"):
        Report.read(file)
    for content, said in (("[1]", "not a report"), ('{"schema_version": 9}', "schema 9")):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=said):
            Report.read(file)


def test_a_cell_that_fails_is_a_row_and_the_rest_goes_on(model: Model, tmp_path: Path) -> None:
    ours, fp32 = model.specs
    lost = replace(ours, variant="lost", path=str(tmp_path / "gone"))
    broken = replace(ours, variant="broken", engine="ctranslate2", precision="int4")
    sweep = Sweep([replace(model, specs=(lost, broken, fp32))], QUICK)
    sweep.run()
    rows = {result.cell.variant: result for result in sweep.results.values()}
    assert rows["lost"].status == rows["broken"].status == "failed"
    assert "gone" in rows["lost"].reason
    assert "int4" in rows["broken"].reason
    assert len(rows["onnx-fp32"].samples) == 2


def test_a_memory_limit_makes_a_failed_row(model: Model) -> None:
    sweep = Sweep([model], replace(QUICK, rounds=1, memory_limit_mb=8))
    sweep.run()
    assert {r.status for r in sweep.results.values()} == {"failed"}
    assert all("memory limit" in r.reason for r in sweep.results.values())


def test_ctrl_c_keeps_what_there_is(model: Model) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    report = run_bench([model], QUICK, report=stop)
    assert report.interrupted
    first, second = report.cells
    assert len(first.samples) == 1
    assert (second.status, second.reason) == ("interrupted", "stopped before its first process")


def test_unknown_variants_and_bundles(tiny_bundle: Path, tmp_path: Path) -> None:
    model = model_of(tiny_bundle, ["onnx-int2"])
    assert model.missing == {"onnx-int2": "the bundle has no variant onnx-int2"}
    with pytest.raises(BundleNotFound):
        model_of(tmp_path / "nothing")


@pytest.mark.parametrize("variant", ["onnx-fp32", "ctranslate2-float32", "onnx-int8", "numba-int8"])
def test_our_runner_is_the_runtime(variant: str, tiny_bundle: Path) -> None:
    (model,) = [model_of(tiny_bundle, [variant])]
    runner = open_runner(model.specs[0], 1)
    prompts = prompts_of(tiny_bundle, 20, 3)
    runs = [runner.single(prompt, 6) for prompt in prompts]
    assert [run.ids for run in runs] == runner.batch(prompts, 6)
    assert all(list(run.seconds) == sorted(run.seconds) for run in runs)
    # The first token is the likeliest of what may be written.
    codec_size = read_manifest(tiny_bundle).model.vocab_size
    logits = runner.logits(prompts[0].ids)
    assert logits.shape == (20, codec_size)
    controls = len(read_manifest(tiny_bundle).prompt.grammar.special_tokens())
    assert int(np.argmax(logits[-1][controls:400])) + controls == runs[0].ids[0]
    runner.close()


def test_guessed_tokens_make_a_row_of_their_own(tiny_bundle: Path) -> None:
    names = ["onnx-int8", "ctranslate2-int8", "numba-int8"]
    model = model_of(tiny_bundle, names, speculate=True)
    told = [spec.variant for spec in model.specs]
    assert told == [
        "onnx-int8",
        "ctranslate2-int8",
        "numba-int8",
        "numba-int8+speculation",
    ]
    assert [spec.variant for spec in model.as_shipped] == names
    (prompt,) = prompts_of(tiny_bundle, 20, 1)
    answers = []
    for spec in model.specs[2:]:
        with closing(open_runner(spec, 1)) as runner:
            answers.append([runner.single(prompt, 9).ids for _ in range(3)])
    assert answers[0] == answers[1]


class Forgetful:
    """A runner whose answers depend on what it was asked before."""

    def __init__(self) -> None:
        self.asked = 0

    def single(self, prompt: Prompt, new_tokens: int) -> TimedAnswer:
        self.asked += 1
        return TimedAnswer((self.asked,) * new_tokens, (0.1,) * new_tokens)


def test_another_answer_behind_a_cached_prefix_is_an_error() -> None:
    prompt = {"request": "a", "words": 9, "ids": [1, 2]}
    job = {"scenario": "variations", "prompts": [prompt], "other": prompt}
    runner: Any = Forgetful()
    with pytest.raises(EngineError, match="another answer when its beginning is in the cache"):
        run_scenario(runner, {**job, "repetitions": 2, "new_tokens": 3})


def test_without_a_reference_there_is_adherence_alone(tiny_bundle: Path) -> None:
    (quality,) = assess(model_of(tiny_bundle, ["onnx-int8"]), EXAMPLES, 1)
    assert quality.fidelity is None
    assert quality.reference == ""
    assert (quality.adherence or {})["answers"] == 3


def test_endurance_of_what_cannot_be_opened(model: Model, tmp_path: Path) -> None:
    gone = replace(model.specs[0], path=str(tmp_path / "gone"))
    result = endurance(model, gone, 1, 10)
    assert "gone" in result.reason
    assert result.growth_mb is None


def result(samples: list[ProcessSample], **extra: Any) -> CellResult:
    cell = Cell("m", "v", 1, "single-stream", 16, 3, **extra)
    found = CellResult(cell, "e", "int8", peer=False, disk_bytes=1, step_bytes=2_000, status="ok")
    for sample in samples:
        found = with_sample(found, sample)
    return found


def sample(
    ms: float,
    *,
    flags: tuple[str, ...] = (),
    joules: float | None = None,
    bandwidth: float | None = None,
    best: float | None = None,
) -> ProcessSample:
    timing = Timing(total_ms=3 * ms, new_tokens=3, ttft_ms=ms, steps_ms=(ms, ms))
    seconds = 3 * ms / 1e3
    more = {"bandwidth": bandwidth, "best_bandwidth": best}
    return ProcessSample(0, 10.0, False, (timing,), seconds, 50.0, joules, flags, **more)


def test_flagged_samples_are_kept_and_left_out() -> None:
    found = result([sample(1), sample(9, flags=("busy",)), sample(3)])
    assert found.status == "ok"
    assert found.values("tpot_ms") == [1, 3]
    figures = found.figures()
    assert (figures.tpot_ms, figures.flagged) == (2, 1)
    alone = result([sample(9, flags=("busy",))])
    assert (alone.status, alone.reason) == ("flagged", "busy")
    assert alone.values("tpot_ms") == [9]


def test_a_process_is_held_against_the_memory_of_its_moment() -> None:
    assert result([sample(2)]).figures().floor_ratio is None
    # 2 kB take 2, 1 and 0.5 ms; the last process was disturbed.
    moments = (sample(4, bandwidth=1e6), sample(3, bandwidth=2e6))
    disturbed = sample(9, bandwidth=4e6, flags=("busy",))
    assert result([*moments, disturbed]).figures().floor_ratio == 2.5
    best = result([sample(4, bandwidth=1e6, best=1.5e6)]).figures()
    assert (best.floor_ratio, best.best_floor_ratio) == (2, 3)


def test_energy_is_per_token_or_unknown() -> None:
    assert result([sample(1, joules=6.0), sample(1, joules=3.0)]).figures().joules_per_token == 1.5
    assert result([sample(1, joules=6.0), sample(1)]).figures().joules_per_token is None


def test_goodput_counts_what_keeps_the_target() -> None:
    found = result([sample(10), sample(100)])
    # 30 and 300 ms in 0.33 s: one of two is in time.
    assert found.figures(target_ms=100).goodput == pytest.approx(1 / 0.33)


def test_specs_travel_as_json(model: Model) -> None:
    spec = model.specs[0]
    assert Spec.of(json.loads(json.dumps(spec.as_dict()))) == spec
