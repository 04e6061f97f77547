from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_report import make_report

from edge_slm_bench.html import render, write_html
from edge_slm_bench.plots_speed import Line, Point, Spread, bars, front, lines, pareto, spreads
from edge_slm_bench.results import Report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (390, 1200)  # a phone, a desk


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render(report)


class _Seen(HTMLParser):
    """Tags, and the texts of headings and tiles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self._title = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self._title = tag == "h2"

    def handle_data(self, data: str) -> None:
        if self._title:
            self.titles.append(data)
            self._title = False


def test_the_page_needs_nothing_else(page: str) -> None:
    seen = _Seen(page)
    assert not {"script", "link", "img", "iframe"} & set(seen.tags)
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_part_is_there(page: str, report: Report) -> None:
    assert _Seen(page).titles == [
        "random-98m",
        "reference-11m",
        "Speed against fidelity",
        "One request at a time",
        "Variations of a request",
        "Batches",
        "Requests at random times",
        "Fidelity and adherence",
        "Memory over time",
        "The machine",
        "Command and settings",
        "What the figures mean",
    ]
    assert report.command in page
    assert "AMD EPYC 9645, 2 of 2 cores" in page
    assert "killed at its memory limit: 612 MB" in page
    # Per model: the front, three of speed, variations, batches, two of the server, four of words,
    # memory.
    assert _Seen(page).tags.count("figure") == 2 * (1 + 3 + 1 + 1 + 2 + 4 + 1)


def test_the_one_to_choose_is_the_fastest_that_is_faithful(page: str) -> None:
    tiles = dict(re.findall(r"<span>([^<]+)</span><b>([^<]+)</b>", page))
    assert tiles["fastest"] == "onnx-int4"
    assert tiles["smallest"] == "onnx-int4"
    assert tiles["most faithful"] == "onnx-int8"
    assert tiles["the one to choose"] == "onnx-int8"


def test_parts_without_data_are_left_out(report: Report) -> None:
    few = [r for r in report.cells if r.cell.model == "reference-11m" and r.cell.threads == 1]
    single = tuple(r for r in few if r.cell.scenario == "single-stream")
    models = {"reference-11m": report.models["reference-11m"]}
    page = render(replace(report, models=models, cells=single[:2], quality=(), endurance=()))
    assert _Seen(page).titles == [
        "One request at a time",
        "The machine",
        "Command and settings",
        "What the figures mean",
    ]
    assert "goodput" not in page
    empty = Report("edge-slm bench x", "2026-01-31", {}, {}, {}, (), interrupted=True)
    assert "Interrupted" in render(empty)


def test_what_people_name_is_text(report: Report) -> None:
    cell = replace(report.cells[0].cell, model="<b>m", variant="<script>alert(1)</script>")
    odd = replace(report.cells[0], cell=cell)
    page = render(
        replace(report, models={"<b>m": {}}, cells=(odd,), quality=(), endurance=(), command="<i>")
    )
    assert "<script" not in page
    assert "<b>m" not in page
    assert "&lt;i&gt;" in page


def test_the_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "bench.html"
    path.write_text("old", "utf-8")
    write_html(Report("x", "2026-01-31", {}, {}, {}, ()), path)
    assert path.read_text("utf-8").endswith("</html>")
    assert [p.name for p in tmp_path.iterdir()] == ["bench.html"]


def test_the_front_is_what_nothing_beats() -> None:
    points = [
        Point("quick", 1, 90),
        Point("fair", 2, 95),
        Point("beaten", 3, 94),
        Point("twin", 2, 92),
        Point("true", 9, 100, peer=True),
    ]
    assert [p.name for p in front(points)] == ["quick", "fair", "true"]


@pytest.mark.parametrize(
    "svg",
    [
        pareto("a", [Point("one", 2, 100), Point("other", 2, 100, peer=True)], ("x", "y")),
        spreads("b", [Spread("one", [5.0])], "ms"),
        bars("c", [Spread("one", [0.0]), Spread("other", [3.0], peer=True)], "x", 1),
        lines("d", [Line(f"line {i}", [(1, 80 + i), (1000, 90)]) for i in range(6)], ("x", "y")),
    ],
)
def test_plots_of_little_data(svg: str) -> None:
    assert svg.startswith("<svg")
    assert "NaN" not in svg
    assert "var(--s1)" in svg


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
def test_it_fits_a_phone_and_a_desk(page: str, tmp_path: Path) -> None:
    """Measured by a page that holds the report in a frame of each width."""
    frames = "".join(
        f'<iframe style="width:{width}px;height:3000px;border:0" srcdoc="{escape(page)}"></iframe>'
        for width in WIDTHS
    )
    script = """onload = () => document.body.append(Array.from(frames, frame => {
      const root = frame.document.documentElement
      const svgs = [...frame.document.querySelectorAll("svg")].map(s => s.clientWidth)
      return `(${root.scrollWidth} ${frame.innerWidth} ${root.scrollHeight} ${Math.min(...svgs)})`
    }).join(""))"""
    (tmp_path / "frames.html").write_text(
        f"<!doctype html><meta charset=utf-8><body>{frames}<script>{script}</script>", "utf-8"
    )
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={sum(WIDTHS) + 40},3000",
            f"--screenshot={shot}",
            "--dump-dom",
            (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=True,
    )
    found = re.findall(r"\((\d+) (\d+) (\d+) (\d+)\)", done.stdout.rpartition("</iframe>")[2])
    assert len(found) == len(WIDTHS)
    for (scroll, inner, height, svg), width in zip(found, WIDTHS, strict=True):
        assert int(inner) in (width, width - 15)  # a scroll bar's width
        assert int(scroll) <= int(inner)
        assert int(height) > 3000
        assert int(svg) > 200  # no plot is squeezed
    assert shot.read_bytes().startswith(b"\x89PNG")
