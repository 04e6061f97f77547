"""The page that `edge-slm serve` has, in headless Chromium against the real server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_slm.serve.app import _PAGE

from . import chromium
from .chromium import Page
from .test_serve import KEY, NAME, Server

pytestmark = pytest.mark.slow
needs_chromium = pytest.mark.skipif(not chromium.PATH, reason="there is no chromium")


def test_nothing_comes_from_elsewhere() -> None:
    page = _PAGE.read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import|url\(|<link|<img|\bsrc=", page)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--rows", "4")
    yield server
    server.process.terminate()
    server.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium.chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(server: Server, browser: Page) -> Iterator[Page]:
    browser.open(server.url)
    browser.wait_for("document.querySelector('#of-key')?.hidden === false")
    browser.problems.clear()  # the call without a key
    give_key(browser)
    yield browser
    assert browser.problems == []


def give_key(page: Page) -> None:
    page.value(f"$('key').value = {KEY!r}; $('key').onchange()")
    page.wait_for(f"$('model').textContent.startsWith({NAME!r})")
    assert page.value("$('error').hidden")


def written(page: Page) -> list[str]:
    page.wait_for("$('answers').ariaBusy === 'false' && $('answers').innerText.includes('words')")
    texts = page.value("[...document.querySelectorAll('article p')].map((p) => p.textContent)")
    assert isinstance(texts, list)
    return texts


@needs_chromium
def test_it_asks_for_a_key_and_writes(page: Page) -> None:
    """With the keyboard alone; three variations side by side."""
    assert page.value("document.activeElement.id") == "request"
    assert page.value("$('error').offsetHeight") == 0
    page.type("a red fox in the snow")
    for _ in range(2):
        page.press("Tab")
    assert page.value("document.activeElement.id") == "words"
    for _ in range(8):
        page.press("ArrowRight")
    assert page.value("$('words-shown').textContent").startswith("10 (3")
    assert page.value("$('best-of').value") == "8"
    page.value("$('n').value = 3; $('best-of').value = 1; $('seed').value = 7")
    page.press("Enter", ctrl=True)
    texts = written(page)
    assert len(set(texts)) == 3
    facts = page.value("[...document.querySelectorAll('article span')].map((s) => s.textContent)")
    for text, fact, seed in zip(texts, facts, (7, 8, 9), strict=True):
        assert fact.startswith(f"{len(text.split())} of 10 words, ")
        assert re.search(r"\d\.\d ms/token", fact)
        assert f"seed {seed}temperature 0 has one answer" in fact


@needs_chromium
def test_it_shows_the_best_of_several(page: Page) -> None:
    page.value(
        "$('request').value = 'a red fox in the snow'; $('n').value = 2; $('seed').value = 7"
    )
    page.value("$('best-of').value = 6; $('words').value = 20; $('form').requestSubmit()")
    assert page.value("$('go').textContent") == "Writing…"
    assert len(set(written(page))) == 2
    assert page.value("$('go').textContent") == "Write"


@needs_chromium
def test_the_slider_has_the_lengths_of_the_task(page: Page) -> None:
    page.value("$('task').value = 'title'; $('task').onchange()")
    assert page.value("$('words-shown').textContent") == "any (1 … 12)"
    page.value("$('words').value = 160; $('words').oninput()")
    assert page.value("$('words-shown').textContent").startswith("12 ")


@needs_chromium
def test_stop_ends_the_work(server: Server, page: Page) -> None:
    before = server.metric('edge_slm_answers_total{finish_reason="cancelled"}')
    page.value("$('request').value = 'a fox'; $('words').value = 150")
    page.value("$('n').value = 8; $('best-of').value = 1")
    page.value("$('form').requestSubmit()")
    page.wait_for("document.querySelectorAll('article').length === 8")
    page.press("Escape")
    page.wait_for("$('stop').disabled")
    server.wait_for("edge_slm_running", 0)
    assert server.metric('edge_slm_answers_total{finish_reason="cancelled"}') > before


@needs_chromium
def test_an_error_is_shown(page: Page) -> None:
    page.value("$('request').value = '<|words:3|>'; $('form').requestSubmit()")
    page.wait_for("!$('error').hidden")
    assert "control token" in page.value("$('error').textContent")
    page.problems.clear()  # the browser notes the status 400


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 390])
def test_how_it_looks(
    server: Server, browser: Page, tmp_path: Path, width: int, dark: bool
) -> None:
    """It fits the width; colours follow the scheme, with contrast. Pictures for people."""
    browser.open(server.url, width, dark=dark)
    browser.wait_for("document.querySelector('#of-key')?.hidden === false")
    give_key(browser)
    browser.value("$('request').value = 'a red fox in the snow'; $('n').value = 3")
    browser.value("$('words').value = 20; $('words').oninput(); $('form').requestSubmit()")
    written(browser)
    browser.picture(tmp_path / f"{width}{'-dark' if dark else ''}.png")
    assert browser.value("document.documentElement.scrollWidth") <= width
    back, text = (
        browser.value(
            f"getComputedStyle(document.querySelector('article')).{name}"
            ".match(/[\\d.]+/g).slice(0, 3).map(Number)"
        )
        for name in ("backgroundColor", "color")
    )
    assert (sum(back) < sum(text)) == dark
    assert abs(sum(back) - sum(text)) > 450
    assert browser.value("[...document.querySelectorAll('button')].every((b) => b.innerText)")
