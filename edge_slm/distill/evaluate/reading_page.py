"""The page to grade answers on: one answer at a time, one key each. It keeps the grades in the
browser until they are downloaded, and asks nothing of any server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_slm_bench.page import THEME, environment


def render(sheet: Mapping[str, Any], grades_name: str) -> str:
    """sheet: "sheet" its digest, "key" the name of its key, "answers". grades_name: of the file
    to download. Raises DependencyMissing."""
    template = environment().from_string(_TEMPLATE)
    return str(template.render(sheet=sheet, grades_name=grades_name, theme=THEME))


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Usable or not?</title>
<style>
{{ theme | safe }}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 2rem 1.1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 var(--font); }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
.muted { color: var(--muted); font-size: .9rem; }
article { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem;
  padding: 1rem 1.2rem; margin: 1.2rem 0; overflow-wrap: anywhere; }
#request { font-weight: 600; margin: .2rem 0 .8rem; }
#text { font-size: 1.15rem; margin: 0; min-height: 6rem; white-space: pre-wrap; }
button { font: inherit; color: var(--ink); background: var(--card); padding: .45rem .9rem;
  border: 1px solid var(--grid); border-radius: .5rem; cursor: pointer; }
button[aria-pressed=true] { border-color: var(--s1); box-shadow: 0 0 0 1px var(--s1); }
kbd { font: .85em ui-monospace, monospace; color: var(--muted); }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
progress { width: 100%; accent-color: var(--s1); }
</style>
</head>
<body>
<h1>Usable or not?</h1>
<p class="muted">Usable: you would use the text as it is for what was requested. It is fluent and
whole, about the request, of the kind and about the length asked for.</p>
<progress id="bar" value="0"></progress>
<div class="muted" id="status" role="status"></div>
<article aria-live="polite">
<div class="muted" id="about"></div>
<p id="request"></p>
<p id="text"></p>
</article>
<div class="row">
<button id="yes"><kbd>1</kbd> usable</button>
<button id="no"><kbd>2</kbd> not</button>
<button id="clear"><kbd>0</kbd> take back</button>
<button id="back"><kbd>←</kbd></button>
<button id="next"><kbd>→</kbd></button>
<button id="open">next ungraded <kbd>n</kbd></button>
<button id="save">download the grades</button>
</div>
<script id="sheet" type="application/json">{{ sheet | tojson }}</script>
<script>
"use strict";
const sheet = JSON.parse(document.getElementById("sheet").textContent);
const store = "edge-slm-grades-" + sheet.sheet;
const by = (id) => document.getElementById(id);
let kept = true;
let usable = {};
let at = 0;
try {
  usable = JSON.parse(localStorage.getItem(store) || "{}");
} catch (error) {
  kept = false;
}
function ungraded(from) {
  const order = sheet.answers.map((_, i) => (from + i) % sheet.answers.length);
  return order.find((i) => !(sheet.answers[i].number in usable));
}
function show() {
  const answer = sheet.answers[at];
  const grade = usable[answer.number];
  const done = Object.keys(usable).length;
  by("about").textContent = answer.task + ", " + answer.asked_words
    + (answer.asked_words === 1 ? " word" : " words") + " asked";
  by("request").textContent = answer.request;
  by("text").textContent = answer.text || "(no answer)";
  by("yes").setAttribute("aria-pressed", grade === true);
  by("no").setAttribute("aria-pressed", grade === false);
  by("bar").max = sheet.answers.length;
  by("bar").value = done;
  by("status").textContent = "answer " + (at + 1) + " of " + sheet.answers.length + ", " + done
    + " graded" + (kept ? "" : "; this browser keeps no grades: download them before you leave");
}
function go(to) {
  at = Math.max(0, Math.min(sheet.answers.length - 1, to));
  show();
}
function grade(value) {
  const number = sheet.answers[at].number;
  if (value === null) delete usable[number];
  else usable[number] = value;
  try {
    localStorage.setItem(store, JSON.stringify(usable));
  } catch (error) {
    kept = false;
  }
  go(value === null ? at : at + 1);
}
function download() {
  const grades = JSON.stringify({ sheet: sheet.sheet, key: sheet.key, usable: usable }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([grades + "\\n"], { type: "application/json" }));
  link.download = {{ grades_name | tojson }};
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
const actions = {
  "1": () => grade(true), "2": () => grade(false), "0": () => grade(null),
  ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1),
  n: () => go(ungraded(at) ?? at),
};
const buttons = { yes: "1", no: "2", clear: "0", back: "ArrowLeft", next: "ArrowRight", open: "n" };
for (const [id, key] of Object.entries(buttons)) by(id).addEventListener("click", actions[key]);
by("save").addEventListener("click", download);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
});
go(ungraded(0) ?? 0);
</script>
</body>
</html>
"""
