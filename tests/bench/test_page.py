from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from edge_slm_bench.page import Card, Figure, Section, Table, Tile, render_page
from edge_slm_bench.plots import Curve, Interval, curves, forest, matrix, scatter

PLOTS = {
    "scatter": scatter("a", [(8, 7, 3), (16, 0, 1)], [(8, 6, 10), (16, 14, 18)], ("asked", "got")),
    "curves": curves(
        "b",
        ["0", "1", "2"],
        [Curve("c & d", [0.1, None, 0.3], [0, None, 0.2], [0.2, None, 0.4]), Curve("line", [0.5])],
        ("level", "reward"),
    ),
    "matrix": matrix("c", ["image", "video"], [[3, 1], [0, 0]]),
    "forest": forest(
        "d", [Interval("x", 0.9, 0.8, 1.1, "one"), Interval("x", 1, None, None, "two")], 1, "ratio"
    ),
}


class _Tags(HTMLParser):
    """Checks that every tag is closed in its turn."""

    VOID = frozenset(("meta", "br", "path", "use", "rect", "circle"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_xml_that_takes_colour_and_font_from_the_page(name: str) -> None:
    svg = PLOTS[name]
    root = ET.fromstring(svg)
    assert root.get("viewBox")
    assert root.get("width") is None  # as wide as its place
    assert root.get("aria-label")
    assert "var(--font)" in svg
    assert "var(--s1)" in svg
    left = set(re.findall(r"#[0-9a-f]{6}\b", svg)) - {"#000000", "#ffffff"}
    assert not left


def test_plots_are_the_same_in_every_run() -> None:
    assert matrix("c", ["image", "video"], [[3, 1], [0, 0]]) == PLOTS["matrix"]


def test_no_two_plots_share_an_id() -> None:
    ids = [found for svg in PLOTS.values() for found in re.findall(r'id="([^"]+)"', svg)]
    assert len(set(ids)) == len(ids)


def test_the_page_is_whole_escaped_and_needs_nothing_else() -> None:
    page = render_page(
        "A <title>",
        "and & more",
        [Tile("hits", "90%", "[80, 95]"), Tile("misses", "10%")],
        [
            Section(
                "One",
                "text",
                [Figure(svg, "caption") for svg in PLOTS.values()],
                [Table(["name", "x"], [["<script>", "1"], ["*all", "2"]])],
                [Card("a <b>request", "an answer", "a note")],
            )
        ],
    )
    assert not _Tags(page).open
    assert "A &lt;title&gt;" in page
    assert "<script" not in page
    assert "a &lt;b&gt;request" in page
    assert '<tr class="strong"><td>all</td>' in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    # Nothing is fetched: addresses are only names of XML spaces.
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert "url(http" not in page
