"""The figures as tables, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edge_slm.distill.evaluate.by_task import SHORT
from edge_slm_bench.page import Table

if TYPE_CHECKING:
    from rich.console import Console

_FAULTS = {
    "invented": "an invented word",
    "repeats": "a repeated trigram",
    "unfinished": "no end of the last sentence",
    "quoted": "the text to show, verbatim",
    "keywords": "keywords of a scene",
}
Result = Mapping[str, Any]

MORE = "P(higher gives more)"

_SCORERS = {
    "relevance": "MiniLM",
    "wordllama": "WordLlama",
    "use": "USE",
    "keywords": "request kept",
}


def show(result: Result, console: Console) -> None:
    """Prints every table."""
    console.print(about(result))
    for table in tables(result):
        console.print()
        print_table(table, console)
    console.print(f"\n{footnote(result)}")


def print_table(table: Table, console: Console) -> None:
    """In the terminal, as wide as that allows."""
    from rich.table import Table as RichTable

    shown = RichTable(title=table.caption, title_justify="left", box=None, pad_edge=False)
    for i, head in enumerate(table.head):
        shown.add_column(head, justify="right" if i else "left")
    for row in table.rows:
        shown.add_row(*(cell.removeprefix("*") for cell in row))
    console.print(shown)


def about(result: Result) -> str:
    tasks = ", ".join(f"{task} {n}" for task, n in result["tasks"].items())
    return (
        f"{result['model']['name']} {result['model']['variant']}: {result['requests']} held-out "
        f"requests ({tasks}), {result['generations']} generations, greedy"
    )


def footnote(result: Result) -> str:
    seen = ", ".join(s["name"] for s in result["scorers"] if s["training"])
    return (
        f"[ ]: {result['intervals']}; shuffled: the spread of chance. "
        f"† had part in the training reward: {seen}. "
        f"Requests left out because the context has no room: {result['too_long']}. Commands moved "
        f"to the nearest that training saw: {result['commands_moved']}."
    )


def tables(result: Result) -> list[Table]:
    return [
        length_table(result),
        level_table(result),
        axis_table(result),
        *([task_table(result)] if result["task"] else []),
        comparison_table(result),
        faults_table(result),
        obedience_table(result),
        cross_talk_table(result),
        *tables_by_task(result),
    ]


def scorer_names(result: Result) -> dict[str, str]:
    """Scorer → heading, of the scorers in tables: the training reward, MiniLM and those
    without part in training."""
    training = [s["name"] for s in result["scorers"] if s["training"]]
    names = {training[0]: _SCORERS.get(training[0], "reward") + "†"}
    if "relevance" in training:
        names["relevance"] = "MiniLM†"
    for scorer in result["scorers"]:
        if not scorer["training"]:
            names[scorer["name"]] = _SCORERS.get(scorer["name"], scorer["name"])
    return names


def figure(estimate: Mapping[str, Any], form: str = ".3f") -> str:
    """Value and interval: 0.912 [0.897, 0.926]."""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if value is None:
        return "–"
    if low is None:
        return format(value, form)
    ends = ".0%" if form == ".1%" else form
    return f"{value:{form}} [{low:{ends}}, {high:{ends}}]".replace("%,", ",")


def bare(estimate: Mapping[str, Any], form: str = ".3f") -> str:
    return "–" if estimate["value"] is None else format(estimate["value"], form)


def length_table(result: Result) -> Table:
    alone, kept = result["length"]["model alone"], result["length"]["with the promise"]

    def row(name: str, a: Any, k: Any) -> list[str]:
        errors = bare(a["mean_absolute_error"], ".2f"), bare(k["mean_absolute_error"], ".2f")
        hits = figure(a["hit_rate"], ".1%"), bare(k["hit_rate"], ".1%")
        return [name, str(a["generations"]), hits[0], errors[0], hits[1], errors[1]]

    rows = [row(words, a, kept["by_length"][words]) for words, a in alone["by_length"].items()]
    rows.append(row("*all", alone["all"], kept["all"]))
    for name, title in (("spearman", "Spearman"), ("monotonicity", MORE)):
        figures = figure(alone["all"][name]), bare(kept["all"][name])
        rows.append([title, "", figures[0], "", figures[1], ""])
    head = ["words asked", "n", "within ±10% or ±2, model alone", "mean abs. error"]
    return Table(
        [*head, "with the promise", "mean abs. error"], rows, "Length, at the highest level"
    )


def level_table(result: Result) -> Table:
    names = scorer_names(result)
    ratios = {key: name for key, name in names.items() if key != "keywords"}
    first = next(iter(names))

    def row(name: str, scores: Any, ratio: Any, r: Any) -> list[str]:
        return [
            name,
            *((figure if key == first else bare)(scores[key]) for key in names),
            *(bare(ratio[key]) if ratio else "1" for key in ratios),
            f"{r['words']:.1f}",
            f"{r['distinct_2']:.3f}",
            bare(r["echo"]),
        ]

    rows = [
        row("any" if r["level"] is None else str(r["level"]), r["scores"], r["ratio"], r)
        for r in result["relevance"]["rows"]
    ]
    references = next(r for r in result["answers"] if r["kind"] == "references")
    rows.append(row("*references", references["scores"], None, references))
    for title, part in ((MORE, "monotonicity"), ("Spearman, level → mean", "spearman_of_means")):
        by_name = result["relevance"][part]
        cells = [(figure if key == first else bare)(by_name[key]) for key in names]
        rows.append([title, *cells])
        rows.append(["– shuffled", figure(result["relevance"]["shuffled"][part])])
    width = len(names) + len(ratios) + 4
    rows = [[*row, *[""] * (width - len(row))] for row in rows]
    head = ["level asked", *names.values(), *(f"{name} ÷ ref." for name in ratios.values())]
    return Table(
        [*head, "words", "distinct-2", "echo"],
        rows,
        "Relevance at the references' lengths, model alone",
    )


def axis_table(result: Result) -> Table:
    lengths, levels = result["length"]["model alone"], result["relevance"]
    rows = []
    for task in (*result["tasks"], "all"):
        words = lengths["all"] if task == "all" else lengths["by_task"][task]
        level = levels["all"] if task == "all" else levels["by_task"][task]
        rows.append(
            [
                "*all" if task == "all" else task,
                str(result["requests"] if task == "all" else result["tasks"][task]),
                bare(words["hit_rate"], ".1%"),
                bare(words["mean_absolute_error"], ".2f"),
                figure(words["spearman"], ".2f"),
                bare(words["monotonicity"]),
                bare(level["hit_rate"], ".1%"),
                bare(level["mean_absolute_error"], ".2f"),
                figure(level["spearman"], ".2f"),
                figure(level["monotonicity"], ".2f"),
            ]
        )
    words_head = ("words: hit", "error", "Spearman", MORE)
    level_head = ("level: hit", "error", "Spearman", MORE)
    return Table(
        ["task", "requests", *words_head, *level_head], rows, "Every axis per task, model alone"
    )


def task_table(result: Result) -> Table:
    rows = [
        [
            name,
            str(row["words"]),
            figure(row["accuracy"], ".1%"),
            figure(row["own_accuracy"], ".1%"),
            figure(row["references_accuracy"], ".1%"),
            str(row["references_accuracy"]["n"]),
        ]
        for name, row in [
            *result["task"]["by_task"].items(),
            ("*all", {**result["task"], "words": ""}),
        ]
    ]
    return Table(
        ["task asked", "words", "of every request", "of its own requests", "references", "own n"],
        rows,
        "Task: answers that a classifier takes for what was asked",
    )


def comparison_table(result: Result) -> Table:
    names = {key: name for key, name in scorer_names(result).items() if key != "keywords"}
    rows = []
    for r in result["answers"]:
        if not r["n"]:
            rows.append([r["name"], "0", *["–"] * (2 * len(names) + 7)])
            continue
        ratio = r["model_ratio"]
        rows.append(
            [
                f"*{r['name']}" if r["kind"] == "references" else r["name"],
                str(r["n"]),
                f"{r['words']:.1f}",
                *(bare(r["scores"][key]) for key in names),
                *(figure(ratio[key]) for key in names),
                " ".join(f"{r[f'distinct_{n}']:.2f}" for n in (1, 2, 3)),
                bare(r["self_similarity"]),
                bare(r["echo"]),
                bare(r["added_words"], ".1f"),
                bare(r["scores"]["keywords"], ".1%"),
            ]
        )
    head = ["answers", "n", "words", *names.values(), *(f"model ÷ {n}" for n in names.values())]
    return Table(
        [*head, "distinct-1 -2 -3", "self-sim.", "echo", "words added", "request kept"],
        rows,
        "Relevance and diversity; model ÷: the first row ÷ this one, same requests",
    )


def faults_table(result: Result) -> Table:
    found = [
        name for name in _FAULTS if any(name in r.get("faults", {}) for r in result["answers"])
    ]
    rows = [
        [
            f"*{r['name']}" if r["kind"] == "references" else r["name"],
            *(figure(r["faults"][n], ".1%") if n in r["faults"] else "–" for n in found),
        ]
        for r in result["answers"]
        if r["n"]
    ]
    return Table(
        ["answers", *(_FAULTS[name] for name in found)], rows, "Share of answers that have …"
    )


def obedience_table(result: Result) -> Table:
    rows = [
        [
            r["name"],
            figure(r["obedience"]["words_hit_rate"], ".1%"),
            figure(r["obedience"]["words_spearman"]),
            figure(r["obedience"]["level_hit_rate"], ".1%"),
            figure(r["obedience"]["level_spearman"]),
        ]
        for r in result["answers"]
        if r["n"] and r["kind"] in ("model", "baseline")
    ]
    return Table(
        ["answers", "words within tolerance", "words Spearman", "level hit", "level Spearman"],
        rows,
        "Held against the references' own words and level",
    )


def cross_talk_table(result: Result) -> Table:
    talk = result["cross_talk"]
    words, reward = talk["words_by_level"], talk["reward_by_length"]
    shares = [row["words_per_asked"]["value"] for row in words["rows"]]
    shifts = [row["shift"]["value"] for row in reward["rows"]]
    return Table(
        ["commanded → measured", f"{MORE} (0.5: no influence)", "lowest", "highest"],
        [
            [
                "level → words ÷ words asked",
                figure(words["monotonicity"]),
                f"{min(shares):.3f}",
                f"{max(shares):.3f}",
            ],
            [
                "words → reward − mean of the request",
                figure(reward["monotonicity"]),
                f"{min(shifts, default=0):+.3f}",
                f"{max(shifts, default=0):+.3f}",
            ],
        ],
        "Cross-talk between the axes",
    )


def tables_by_task(result: Result) -> list[Table]:
    """A table per task: a row per set of answers."""
    return [_of_task(result, task, n) for task, n in result["tasks"].items()]


def _of_task(result: Result, task: str, n: int) -> Table:
    rows = [(row, row["by_task"][task]) for row in result["answers"] if task in row["by_task"]]
    independent = [s["name"] for s in result["scorers"] if not s["training"]]
    names = {key: name for key, name in scorer_names(result).items() if key in independent}
    names.pop("keywords", None)
    judged = [name for name in _FAULTS if any(name in part["faults"] for _, part in rows)]
    cells = [
        [
            f"*{row['name']}" if row["kind"] == "references" else row["name"],
            bare(part["words_hit_rate"], ".0%"),
            *(figure(part["reference_ratio"][key], ".2f") for key in names),
            figure(part["kept_short"], ".1%"),
            bare(part["reference_ratio"]["added"], ".2f"),
            *(bare(part["faults"][name], ".0%") for name in judged),
        ]
        for row, part in rows
    ]
    head = [
        "answers",
        "words within tolerance",
        *(f"{name} ÷ ref." for name in names.values()),
        f"request kept, ≤ {SHORT} words",
        "added words ÷ ref.",
        *(_FAULTS[name] for name in judged),
    ]
    return Table(head, cells, f"{task}: {n} requests")
