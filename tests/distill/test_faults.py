"""Faults of texts: what is one, and what only looks like one."""

from __future__ import annotations

import pytest

from edge_slm.distill.evaluate.faults import faults, invented, quoted, repeats, unfinished
from edge_slm.distill.samples import Sample


@pytest.mark.parametrize(
    "text",
    [
        "A man is rideed to the bike.",
        "A cramfram on a hill.",  # of two short words, but no compound
        "The papplexexe stands in the snow.",
        "A fox, mountainious and calm.",
    ],
)
def test_invented_words(text: str) -> None:
    assert invented("a fox", text)


@pytest.mark.parametrize(
    "text",
    [
        "A fox in the colour of a harbour at dusk.",  # British spelling
        "Sci-fi, multi-layered, ukiyo-e, with bokeh and a pixelated cafe.",
        "Snowflakes drift over the moonlit lakeside, softly.",
        'A sign that says "Vlorptastic" over a door.',  # shown, not said
        "A Zorblax stands in the café.",  # the request's own
        "8k, f/1.8, 35mm, HDR",
    ],
)
def test_what_is_not_invented(text: str) -> None:
    assert not invented("a zorblax", text)


def test_repeats_and_ends() -> None:
    assert repeats("a red fox and a red fox")
    assert not repeats("a red fox and a blue fox")
    assert unfinished("a fox in the")
    assert not unfinished("It says “stop.”")


def test_quotations_are_kept_verbatim() -> None:
    assert quoted('a sign with "Open Late"', 'A neon sign reads "Open late" at night.')
    assert not quoted('a sign with "Open Late"', "A neon sign that is open, late.")
    assert quoted("Open late", "A neon sign: Open late!")


def test_tasks_are_judged_by_what_applies_to_them() -> None:
    samples = [Sample("a fox", "", "image"), Sample("fox, snow", "", "scene")]
    both = faults(samples, ["a fox in the", "A fox runs."])
    assert set(both) == {"invented", "repeats", "unfinished", "keywords"}
    assert both["unfinished"]["value"] == 0.5
    assert both["keywords"] == {"value": 0.5, "low": None, "high": None, "n": 1}
    assert set(faults([Sample("a cat", "", "tags")], ["cat, pet"])) == {"invented"}
