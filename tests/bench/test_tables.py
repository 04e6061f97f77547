from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import fields, replace

import pytest
from made_report import KINDS, make_report, measured
from rich.console import Console

from edge_slm_bench import tables
from edge_slm_bench.results import Cell, CellResult, Figures, Report, percentile
from edge_slm_bench.rows import number, speed_tables

EMPTY = Report("edge-slm bench x", "2026-01-31", {}, {}, {}, (), interrupted=True)


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


def shown(report: Report, width: int) -> str:
    out = io.StringIO()
    tables.show(report, Console(file=out, width=width, force_terminal=True, color_system=None))
    return out.getvalue()


def only(report: Report, *cells: CellResult) -> Report:
    return replace(report, cells=cells, quality=(), endurance=())


def test_a_report_survives_json(report: Report) -> None:
    data = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    again = Report.of(data)
    assert json.loads(json.dumps(again.as_dict())) == data
    assert again.cells == report.cells


def test_a_row_is_a_variant_at_some_threads(report: Report) -> None:
    (big, small) = speed_tables(report, "single-stream")
    assert [row[:2] for row in big.rows][:4] == [
        ["onnx-fp32", "1"],
        ["onnx-fp32", "2"],
        ["onnx-int8", "1"],
        ["onnx-int8", "2"],
    ]
    assert len(big.rows) == 2 * (len(KINDS) + 1)
    assert "48 new tokens" in big.caption
    assert [head for head in big.head if head.startswith("TTFT")] == [
        "TTFT ms 16",
        "TTFT ms 64",
        "TTFT ms 256",
    ]
    assert "TTFT ms 256" not in small.head  # longer than its context: nobody has it


def test_figures_are_those_of_the_cell(report: Report) -> None:
    table = speed_tables(report, "single-stream")[0]
    shown = dict(zip(table.head, table.rows[4], strict=True))  # onnx-int4, 1 thread
    cells = [
        report.figures(r)
        for r in report.cells
        if r.cell == replace(r.cell, model="random-98m", variant="onnx-int4", threads=1)
        and r.cell.scenario == "single-stream"
    ]
    shortest, longest = cells[0], cells[-1]
    assert shown["TTFT ms 16"] == number(shortest.ttft_ms)
    assert shown["TTFT ms 256"] == number(longest.ttft_ms)
    assert shown["TPOT ms p50"] == number(shortest.tpot_ms)
    assert shown["p99"] == number(shortest.tpot_p99_ms)
    assert shown["tg tok/s"] == number(shortest.tg_per_second)
    assert shown["pp tok/s"] == number(longest.pp_per_second)
    assert shown["× floor"] == number(shortest.floor_ratio)
    assert shown["disk MB"].removeprefix("*") == "67.0"


def test_the_best_is_marked_but_not_the_disturbed(report: Report) -> None:
    table = speed_tables(report, "single-stream")[0]
    first = table.head.index("TTFT ms 16")
    marked = [(row[0], row[1]) for row in table.rows if row[first].startswith("*")]
    quickest = min(table.rows[:12], key=lambda row: float(row[first].strip("*†")))
    assert quickest[first].endswith("†")
    assert marked
    assert (quickest[0], quickest[1]) not in marked


def test_the_best_is_that_of_its_load(report: Report) -> None:
    table = speed_tables(report, "server")[0]
    at = table.head.index("latency ms p50")
    marked = [row[2] for row in table.rows if row[at].startswith("*")]
    assert sorted(marked) == ["2", "4"]


def test_what_has_no_figures_says_why(report: Report) -> None:
    notes = speed_tables(report, "single-stream")[0].notes
    assert any(n.startswith("°") for n in notes)
    assert (
        "failed: onnx-fp32, 2 threads, 256 prompt tokens: "
        "killed at its memory limit: 612 MB, allowed 600 MB" in notes
    )
    assert any(n.startswith("skipped: openvino-int4: openvino is not installed") for n in notes)
    assert any(
        n.startswith("† disturbed in every process: onnx-int8, 2 threads, 16") for n in notes
    )
    rows = {tuple(row[:2]): row for row in speed_tables(report, "single-stream")[0].rows}
    assert rows["openvino-int4 °", "1"][2] == "skipped"
    assert set(rows["openvino-int4 °", "1"][3:]) == {"–"}
    small = speed_tables(report, "single-stream")[1].notes
    assert "skipped: 6 variants, 256 prompt tokens: 256 + 48 tokens do not fit 128" in small


def test_columns_follow_the_scenario(report: Report) -> None:
    offline, server = (speed_tables(report, s)[0] for s in ("offline", "server"))
    assert offline.head[:5] == ["variant", "threads", "batch 1", "batch 8", "batch 32"]
    assert server.head[2] == "requests/s"
    assert "within 500 ms, requests/s" in server.head
    assert "2 workers" in server.caption


def test_energy_is_a_figure_or_unavailable_never_zero(report: Report) -> None:
    bare = measured(Cell("random-98m", "onnx-int8", 2, "single-stream", 16, 48))
    counted = replace(bare, samples=tuple(replace(s, joules=0.72) for s in bare.samples))
    other = measured(Cell("random-98m", "onnx-fp32", 2, "single-stream", 16, 48))
    both = speed_tables(only(report, counted, other), "single-stream")[0]
    assert both.head[-1] == "mJ/ token"
    assert [row[-1] for row in both.rows] == ["5.00", "unavailable"]
    none = only(report, other)
    assert "mJ/ token" not in speed_tables(none, "single-stream")[0].head
    assert "energy per token: unavailable (no RAPL" in tables.markdown(none)


@pytest.mark.parametrize("width", [60, 100, 200])
def test_nothing_is_wider_than_the_terminal(report: Report, width: int) -> None:
    text = shown(report, width)
    assert max(map(len, text.splitlines())) <= width
    for wanted in ("transformers-fp32 °", "4175", "GB/s", "unavailable", "top-1", "growth"):
        assert wanted in text
    assert "…" not in text  # nothing cut


def test_names_are_no_markup(report: Report) -> None:
    cell = Cell("[red]m", "a|b *[bold]*", 2, "single-stream", 16, 48)
    result = replace(measured(replace(cell, model="random-98m", variant="onnx-int8")), cell=cell)
    failed = replace(result, cell=replace(cell, threads=1), status="failed", reason="[/x] <y>")
    odd = only(report, result, replace(failed, samples=()))
    assert "[red]m" in shown(odd, 200)
    assert "a|b *[bold]*" in shown(odd, 200)
    assert "[/x] <y>" in shown(odd, 200)
    assert r"a\|b \*[bold]\*" in tables.markdown(odd)


def test_markdown_tables_are_whole(report: Report) -> None:
    text = tables.markdown(report)
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    assert len(blocks) == 2 * 4 + 2 * 2 + 2
    for block in blocks:
        head, rule, *rows = block.strip().splitlines()
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *rows)}
        assert len(counts) == 1
        assert rows
        assert re.fullmatch(r"\|(-{3}\||--:\|)+", rule)
    assert "AMD EPYC 9645, 2 of 2 cores" in text


def test_answers_that_differ_have_a_table(report: Report) -> None:
    table = next(t for t in tables.quality_tables(report) if "differ" in t.caption)
    assert table.head == ["variant", "answers", "batch 8", "prefix cache"]
    assert table.rows[2:] == [
        ["onnx-int4", "200", "3", "0"],
        ["ctranslate2-int8", "200", "0", "–"],
    ]


def test_csv_has_every_figure_of_every_cell(report: Report) -> None:
    odd = replace(report.cells[0], reason='he said "no",\nand left')
    report = replace(report, cells=(odd, *report.cells[1:]))
    text = tables.csv(report)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(report.cells)
    assert text.startswith("model,variant,threads,scenario,")
    assert text.endswith("\r\n")
    assert rows[0]["reason"] == odd.reason
    for row, result in zip(rows, report.cells, strict=True):
        figures = report.figures(result).as_dict()
        for name in (f.name for f in fields(Figures)):
            assert row[name] == ("" if figures[name] is None else str(figures[name]))
        assert row["status"] == result.status
        assert int(row["prompt_tokens"]) == result.cell.prompt_tokens
    assert float(rows[3]["fidelity_top1"]) == 1
    assert rows[0]["endurance_requests"] == "1000"
    assert rows[0]["joules_per_token"] == ""


def test_a_report_of_nothing_is_shown(report: Report) -> None:
    assert "interrupted" in shown(EMPTY, 80)
    assert "interrupted" in tables.markdown(EMPTY)
    assert tables.csv(EMPTY).count("\r\n") == 1
    lone = only(report, next(r for r in report.cells if r.status == "skipped"))
    assert "do not fit 128" in shown(lone, 80) or "not installed" in shown(lone, 80)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0.00"),
        (0.3194, "0.32"),
        (3.5, "3.50"),
        (9.96, "10.0"),
        (99.7, "100"),
        (14334.2, "14334"),
    ],
)
def test_numbers_have_about_three_figures(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("q", "least"), [(50, 1), (90, 10), (99, 100)])
def test_a_percentile_needs_a_value_in_its_tail(q: float, least: int) -> None:
    assert percentile([1.0] * (least - 1), q) is None
    assert percentile([1.0] * least, q) == 1
