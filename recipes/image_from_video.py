"""Samples for the image task from those for video, and a folder of samples to train on.

    python recipes/image_from_video.py samples/ out/

Whoever expands an idea for a video describes its picture first. The sentences before the first
that moves the camera or the time are an image prompt for the same request. Rows for image whose
source tests image models (negations, causes, written lines that no user would ask for) are left
out, all others are copied.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = ("CodeGoat24/UniGenBench",)
LEAST, MOST = 14, 70  # words
MOVES = re.compile(
    r"\b(video|camera|footage|clip|frames?|shot|scenes?|pans?|zooms?|tracking|transitions?|"
    r"time-?lapse|slow[- ]motion|begins?|starts?|then|suddenly|finally|gradually|slowly|captures?|"
    r"captured|moment|moves?|moving|motion|continues?|as (?:he|she|it|they|the)|while)\b",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"”’]?\s*")


def still(text: str) -> str:
    """The sentences before the first that moves, as far as they are no more than MOST words."""
    kept: list[str] = []
    for sentence in SENTENCE.findall(text):
        if MOVES.search(sentence) or len(" ".join([*kept, sentence]).split()) > MOST:
            break
        kept.append(sentence.strip())
    return " ".join(kept)


def rows(folders: list[Path]) -> Iterator[dict[str, Any]]:
    for folder in folders:
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text("utf-8").splitlines():
                row = json.loads(line)
                if row["task"] == "image" and row["source"].startswith(TESTS):
                    continue
                yield row
                if row["task"] != "video" or not row["request"] or MOVES.search(row["request"]):
                    continue
                if len((text := still(row["response"])).split()) >= LEAST:
                    derived = {"task": "image", "response": text, "kind": "derived"}
                    yield row | derived | {"id": f"{row['id']}-still"}


def main() -> None:
    *folders, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True)
    with (out / "samples.jsonl").open("w", encoding="utf-8") as file:
        for row in rows(folders):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
