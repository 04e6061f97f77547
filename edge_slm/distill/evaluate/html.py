"""The evaluation as one HTML page: headline, plots, tables, examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_slm.distill.evaluate.tables import (
    about,
    axis_table,
    bare,
    comparison_table,
    cross_talk_table,
    faults_table,
    figure,
    footnote,
    length_table,
    level_table,
    obedience_table,
    scorer_names,
    tables_by_task,
    task_table,
)
from edge_slm_bench.page import Card, Figure, Section, Tile, render_page
from edge_slm_bench.plots import Curve, Interval, curves, forest, matrix, scatter
from edge_slm_runtime.files import write_text
from edge_slm_runtime.length import tolerance

Result = Mapping[str, Any]
_EXAMPLES = 12


def write_html(result: Result, path: str | Path) -> None:
    """One self-contained page, in the place of an older one. Raises DependencyMissing."""
    sections = [_length(result), _relevance(result)]
    if result["task"]:
        sections.append(_task(result))
    sections += [_comparison(result), _by_task(result), _cross_talk(result), _examples(result)]
    title = f"Does {result['model']['name']} obey?"
    page = render_page(title, about(result), _tiles(result), sections, footnote(result))
    write_text(page, Path(path))


def _tiles(result: Result) -> list[Tile]:
    alone = result["length"]["model alone"]["all"]
    references = next(row for row in result["answers"] if row["kind"] == "references")
    names = scorer_names(result)
    first = next(iter(names))
    tiles = [
        _tile("words within ±10% or ±2, model alone", alone["hit_rate"], ".1%"),
        _tile("words asked and got, Spearman", alone["spearman"]),
        _tile(
            "of two levels, the higher gives more",
            result["relevance"]["monotonicity"][first],
            ".1%",
        ),
        *(
            _tile(f"{names[key]}, model ÷ references", references["model_ratio"][key])
            for key in names
            if key in ("wordllama", "use")
        ),
    ]
    if result["task"]:
        accuracy = {
            key: bare(result["task"][key], ".1%")
            for key in result["task"]
            if key.endswith("accuracy")
        }
        note = f"own: {accuracy['own_accuracy']}, references: {accuracy['references_accuracy']}"
        tiles.append(Tile("task as commanded", accuracy["accuracy"], note))
    return tiles


def _tile(label: str, estimate: Mapping[str, Any], form: str = ".3f") -> Tile:
    value, _, interval = figure(estimate, form).partition(" ")
    return Tile(label, value, interval)


def _length(result: Result) -> Section:
    part = result["length"]
    asked = [int(label) for label in part["confusion"]["labels"]]
    band = [(n, *tolerance(n)) for n in range(min(asked, default=0), max(asked, default=-1) + 1)]
    return Section(
        "Length",
        "Every request at every length that training saw for its task. The model alone: nothing "
        "helps it to count. With the promise, the decoder holds the end back or cuts.",
        [
            Figure(
                scatter(
                    "Words asked and words got, model alone",
                    part["points"],
                    band,
                    ("words asked", "words got"),
                )
                if part["points"]
                else "",
                "Words asked against words got, model alone. Bubbles: how many answers; green: the "
                "tolerance.",
            ),
            Figure(
                matrix("Length confusion", part["confusion"]["labels"], part["confusion"]["counts"])
                if len(asked) > 1
                else "",
                "The commanded length that an answer came nearest to; per cent of each row.",
            ),
        ],
        [length_table(result)],
    )


def _relevance(result: Result) -> Section:
    part = result["relevance"]
    names = scorer_names(result)
    commanded = [row for row in part["rows"] if row["level"] is not None]
    free = next(row for row in part["rows"] if row["level"] is None)
    references = next(row for row in result["answers"] if row["kind"] == "references")
    first = next(iter(names))
    plots = []
    for key, name in names.items():
        scores = [row["scores"][key] for row in commanded]
        series = [
            Curve("commanded", *([f[end] for f in scores] for end in ("value", "low", "high"))),
            Curve("references", [references["scores"][key]["value"]]),
            Curve("any level", [free["scores"][key]["value"]]),
        ]
        if key == first:
            chance = part["shuffled"]["rows"]
            ends = ([row[end] for row in chance] for end in ("value", "low", "high"))
            series.append(Curve("shuffled command", *ends))
        ticks = [str(row["level"]) for row in commanded]
        plots.append(
            Figure(
                curves(f"{name} by level", ticks, series, ("level asked", name)),
                f"Mean {name} of the answers to each commanded level, with its 95% interval.",
            )
        )
    confusion = part["confusion"]
    plots.append(
        Figure(
            matrix("Level confusion", confusion["labels"], confusion["counts"]),
            "Level asked against the level that the answer's reward falls into; per cent of each "
            "row.",
        )
    )
    return Section(
        "Relevance",
        "Every request at every level, at the reference's own length, model alone. "
        f"† {names[first][:-1]} had part in training; the others had none.",
        plots,
        [level_table(result), axis_table(result)],
    )


def _task(result: Result) -> Section:
    part = result["task"]
    pictures = [
        Figure(matrix(title, part[key]["labels"], part[key]["counts"], ("taken for", side)), text)
        for title, key, side, text in (
            (
                "Task asked and recognised",
                "confusion",
                "asked",
                "Every request commanded as every task: what the text is taken for.",
            ),
            (
                "References as recognised",
                "references_confusion",
                "true task",
                "The same classifier on the held-out references: how far it can be trusted.",
            ),
        )
    ]
    return Section(
        "Task",
        "A classifier that learned from the training side's texts names the task of each answer.",
        pictures,
        [task_table(result)],
    )


def _comparison(result: Result) -> Section:
    def ratios(names: Mapping[str, str]) -> list[Interval]:
        return [
            Interval(row["name"], f["value"], f["low"], f["high"], name)
            for row in result["answers"][1:]
            for key, name in names.items()
            if row["n"] and (f := row["model_ratio"][key])["value"] is not None
        ]

    diversity = {"distinct_2": "distinct-2", "self_similarity": "self-similarity"}
    return Section(
        "Beside others",
        "The model at its highest level and the reference's length, against its own baselines, "
        "the references and others' answers to the same requests.",
        [
            Figure(
                forest("Scores, model ÷ others", ratios(scorer_names(result)), 1, "model ÷ row"),
                "Ratios of mean scores with their 95% intervals; above 1 the model is ahead.",
            ),
            Figure(
                forest("Diversity, model ÷ others", ratios(diversity), 1, "model ÷ row"),
                "Distinct-2 above 1: the model's texts are more varied. Self-similarity above 1: "
                "they are more alike.",
            ),
        ],
        [comparison_table(result), faults_table(result), obedience_table(result)],
    )


def _by_task(result: Result) -> Section:
    return Section(
        "Task by task",
        "All were asked for the references' words. ÷ ref.: the row ÷ the references to the same "
        "requests.",
        tables=tables_by_task(result),
    )


def _cross_talk(result: Result) -> Section:
    part = result["cross_talk"]
    pictures = []
    for key, x, y, label, what in (
        ("words_by_level", "level", "words_per_asked", "level asked", "words got ÷ words asked"),
        ("reward_by_length", "words", "shift", "words asked", "reward − mean of the request"),
    ):
        rows = part[key]["rows"]
        curve = Curve(what, *([row[y][end] for row in rows] for end in ("value", "low", "high")))
        line = Curve("no influence", [1.0 if x == "level" else 0.0])
        ticks = [str(row[x]) for row in rows]
        pictures.append(
            Figure(curves(what, ticks, [curve, line], (label, what)), what.capitalize())
        )
    return Section(
        "Cross-talk",
        "Does a command on one axis move the other one?",
        pictures,
        [cross_talk_table(result)],
    )


def _examples(result: Result) -> Section:
    texts = result["texts"]
    step = max(1, len(texts) // _EXAMPLES)
    return Section(
        "Read some",
        "Evenly drawn, not chosen: the answer at the highest level and the reference's length.",
        cards=[
            Card(
                t["request"],
                t["text"],
                f"{t['task']} · {t['words']} words asked, {len(t['text'].split())} got · "
                f"reward {t['reward']:.2f}",
            )
            for t in texts[::step][:_EXAMPLES]
        ],
    )
