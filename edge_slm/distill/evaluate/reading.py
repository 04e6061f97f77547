"""Reading: answers of several systems, blind and shuffled, graded by a person as usable or not.

A sheet has the answers and a key says which system wrote which; both carry the digest of the
answers, so that grades are never read with the key of another sheet.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_slm.distill.evaluate.reading_page import render
from edge_slm.distill.samples import Sample
from edge_slm_bench.metrics.quality import wilson
from edge_slm_bench.page import Table
from edge_slm_runtime.errors import DataError
from edge_slm_runtime.files import refuse_existing, write_json, write_text

_KEY, _GRADES = ".key.json", ".grades.json"


def write_sheet(
    samples: Sequence[Sample], answers: Mapping[str, Mapping[str, str]], path: Path
) -> dict[str, Any]:
    """Writes the page `path` and its key beside it; the sheet as data, without the systems.

    answers: system → request → text; a request without a text is shown with an empty one.
    Raises TargetExists, DependencyMissing.
    """
    key_path = path.with_suffix(_KEY)
    for target in (path, key_path):
        refuse_existing(target)
    rows = [
        {
            "system": system,
            "task": sample.task,
            "request": sample.request,
            "asked_words": sample.words,
            "text": texts.get(sample.request, ""),
        }
        for system, texts in answers.items()
        for sample in samples
    ]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    random.Random(digest).shuffle(rows)
    numbered = [{"number": number, **row} for number, row in enumerate(rows, 1)]
    blind = [{name: row[name] for name in row if name != "system"} for row in numbered]
    sheet = {"sheet": digest, "key": key_path.name, "answers": blind}
    page = render(sheet, path.with_suffix(_GRADES).name)
    write_json({"sheet": digest, "answers": numbered}, key_path)
    write_text(page, path)
    return sheet


def read_grades(path: Path) -> dict[str, Any]:
    """Usable shares of a sheet's systems, in all and per task, JSON-ready.

    path: what the page downloads, {"sheet", "key", "usable": {number: true or false}}. The key
    is looked for beside it, then in the current folder. Raises DataError.
    """
    grades = _read(path, {"sheet": str, "key": str, "usable": dict})
    folders = (path.parent, Path.cwd())
    name = Path(grades["key"]).name
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise DataError(f"the key {name} is not beside {path}", "put both in one folder")
    key = _read(found, {"sheet": str, "answers": list})
    if key["sheet"] != grades["sheet"]:
        raise DataError(f"{found} is the key of another sheet than {path}", "find the right key")
    answers = {str(answer["number"]): answer for answer in key["answers"]}
    usable = grades["usable"]
    for number, grade in usable.items():
        if number not in answers or not isinstance(grade, bool):
            raise DataError(f"{path}: the grade of answer {number!r} cannot be read", _EXPECTED)
    graded = [(answers[number], grade) for number, grade in usable.items()]
    tasks = sorted({answer["task"] for answer in answers.values()})
    systems = dict.fromkeys(answer["system"] for answer in key["answers"])

    def share(system: str, task: str | None = None) -> dict[str, float | int | None]:
        mine = [grade for a, grade in graded if a["system"] == system and task in (None, a["task"])]
        return wilson(sum(mine), len(mine)).as_dict()

    return {
        "sheet": key["sheet"],
        "answers": len(answers),
        "graded": len(graded),
        "tasks": tasks,
        "systems": {
            system: {"all": share(system), "by_task": {task: share(system, task) for task in tasks}}
            for system in sorted(systems)
        },
    }


_EXPECTED = 'expected {"sheet": text, "key": text, "usable": {number: true or false}}'


def _read(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON", _EXPECTED) from None
    if not isinstance(data, dict):
        raise DataError(f"{path} is not a JSON object", _EXPECTED)
    for name, kind in kinds.items():
        if not isinstance(data.get(name), kind):
            raise DataError(f"{path}: {name!r} is missing or of another kind", _EXPECTED)
    return data


def grades_table(result: Mapping[str, Any]) -> Table:
    """System × task."""

    def cell(share: Mapping[str, Any]) -> str:
        if share["value"] is None:
            return "–"
        low, high = share["low"], share["high"]
        return f"{share['value']:.0%} [{100 * low:.0f}, {high:.0%}]"

    rows = [
        [
            system,
            str(part["all"]["n"]),
            cell(part["all"]),
            *(cell(part["by_task"][task]) for task in result["tasks"]),
        ]
        for system, part in result["systems"].items()
    ]
    caption = f"Usable by reading: {result['graded']} of {result['answers']} answers graded"
    return Table(["answers", "n", "all", *result["tasks"]], rows, caption)
