"""One self-contained HTML page of figures: tiles, plots, tables, examples.

No script, no request to anywhere; light and dark as the reader's system is; narrow
enough for a phone. The plots are SVG from `plots`, coloured by this page's variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_slm_runtime.errors import DependencyMissing


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    """The first `names` columns name the row. A cell that starts with "*" is set in bold,
    the whole row when it is the first. notes: lines below."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    notes: Sequence[str] = ()
    names: int = 1


@dataclass(frozen=True, slots=True)
class Card:
    """An example: the request, the answer, and a remark."""

    asked: str
    text: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """small: its figures are small ones, many in a row. code: something to copy, such as a
    command. facts: (what, its value), in long lists."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    cards: Sequence[Card] = ()
    tiles: Sequence[Tile] = ()
    small: bool = False
    code: str = ""
    facts: Sequence[tuple[str, str]] = ()


def render_page(
    title: str, subtitle: str, tiles: Sequence[Tile], sections: Sequence[Section], foot: str = ""
) -> str:
    """The page as text; everything but the SVG is escaped. Raises DependencyMissing."""
    page = environment().from_string(_TEMPLATE)
    return str(
        page.render(
            title=title, subtitle=subtitle, tiles=tiles, sections=sections, foot=foot, theme=THEME
        )
    )


def environment() -> Any:
    """A `jinja2.Environment` that escapes what it inserts. Raises DependencyMissing."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise DependencyMissing(
            "an HTML page needs jinja2", "pip install 'edge-slm[bench]'"
        ) from None
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


# Colours and type of every page.
THEME = """\
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2127; --muted: #646b76; --grid: #e4e2dc;
  --s1: #2563a8; --s2: #c2571a; --s3: #2c8a5b; --s4: #8a4fa3;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --card: #1c2027; --ink: #e7e9ec; --muted: #9aa3af; --grid: #31363f;
    --s1: #6ea8ec; --s2: #f0935a; --s3: #63c493; --s4: #c493dc;
  }
}
"""

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
{{ theme | safe }}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.1rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 var(--font); }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; letter-spacing: -.005em; }
p { margin: .3rem 0 .9rem; max-width: 46rem; }
header p, .text, figcaption, caption, footer, .note, dt { color: var(--muted); }
.tiles { display: grid; gap: .7rem; margin: 1rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr)); }
.tile, figure, .card { background: var(--card); border: 1px solid var(--grid);
  border-radius: .6rem; }
.tile { padding: .75rem .9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-weight: 600;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { display: block; font-size: .85rem; line-height: 1.35; }
.tile .note { font-size: .78rem; }
.figures { display: grid; gap: .9rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
figure { margin: 0; padding: .7rem .7rem .8rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 32rem; margin: 0 auto; }
figcaption { font-size: .85rem; line-height: 1.4; padding: .4rem .3rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  min-width: 100%; }
caption { text-align: left; font-size: .85rem; padding-bottom: .4rem; }
caption span { display: inline-block; position: sticky; left: 0;
  max-width: min(100%, calc(100vw - 2.2rem)); }
th, td { padding: .38rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th { font-weight: 600; color: var(--muted); font-size: .8rem; line-height: 1.3;
  vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; position: sticky;
  left: 0; background: var(--paper); }
tr.strong td, td.best { font-weight: 600; }
td.best { color: var(--s3); }
.scroll + .notes { margin-top: -.6rem; }
.notes { color: var(--muted); font-size: .8rem; line-height: 1.45; margin: 0 0 1.4rem;
  padding: 0 .2rem; list-style: none; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; margin: 1rem 0;
  padding: .7rem .9rem; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; gap: .15rem 1.2rem; grid-template-columns: minmax(7rem, max-content) 1fr;
  font-size: .88rem; line-height: 1.5; margin: 1rem 0; }
dd { margin: 0; overflow-wrap: anywhere; max-width: 52rem; }
@media (max-width: 34rem) { dl { display: block; } dd { margin-bottom: .55rem; } }
.cards { display: grid; gap: .7rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.card { padding: .8rem .95rem; font-size: .92rem; overflow-wrap: anywhere; }
.card p { margin: 0 0 .45rem; }
.card .asked { font-weight: 600; }
.card .note { font-size: .78rem; margin: 0; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--grid);
  font-size: .85rem; }
@media print { body { max-width: none; } figure, .card, .tile { break-inside: avoid; } }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p>{{ subtitle }}</p>
</header>
{% macro row(tiles) %}
{% if tiles %}
<div class="tiles">
{% for tile in tiles %}
<div class="tile">
<span>{{ tile.label }}</span><b>{{ tile.value }}</b><span class="note">{{ tile.note }}</span>
</div>
{% endfor %}
</div>
{% endif %}
{% endmacro %}
{{ row(tiles) }}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{{ row(section.tiles) }}
{% if section.text %}
<p class="text">{{ section.text }}</p>
{% endif %}
{% if section.code %}
<pre><code>{{ section.code }}</code></pre>
{% endif %}
{% if section.figures %}
<div class="figures{{ ' small' if section.small }}">
{% for figure in section.figures %}
<figure>{{ figure.svg | safe }}<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% for table in section.tables %}
<div class="scroll" tabindex="0"><table>
{% if table.caption %}
<caption><span>{{ table.caption }}</span></caption>
{% endif %}
<thead><tr>{% for cell in table.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr{% if row[0].startswith("*") %} class="strong"{% endif %}>
{%- for cell in row %}
<td{% if cell.startswith("*") and not loop.first %} class="best"{% endif %}>
{{- cell.removeprefix("*") }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if table.notes %}
<ul class="notes">{% for note in table.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% endif %}
{% endfor %}
{% if section.facts %}
<dl>
{% for what, value in section.facts %}
<dt>{{ what }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% endif %}
{% if section.cards %}
<div class="cards">
{% for card in section.cards %}
<article class="card"><p class="asked">{{ card.asked }}</p><p>{{ card.text }}</p>
<p class="note">{{ card.note }}</p></article>
{% endfor %}
</div>
{% endif %}
</section>
{% endfor %}
{% if foot %}
<footer>{{ foot }}</footer>
{% endif %}
</body>
</html>
"""
