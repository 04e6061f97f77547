"""A folder of samples to train a prompt model on, made of folders of raw ones.

    python recipes/curate.py samples/ more-samples/ out/

Answers teach their faults, so rows whose texts nobody would paste are left out, by rules that
were made by reading: test prompts of image models (negations, causes), lists of artists' sites,
lines of writing where no one asked for any (small models then write signs into every picture).

The image task has few good pairs. Whoever expands an idea for a video describes its picture
first, so the sentences of a video prompt that move neither camera nor time are an image prompt
for its request.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_slm_runtime.files import write_jsonl

SOURCES_LEFT_OUT = {
    "image": (
        "CodeGoat24/UniGenBench",  # tests of image models
        "yifan123/flow_grpo",  # lines of writing in every picture
        "THUDM/ImageReward",  # artists' sites and render engines
        "google/imageinwords",  # captions of a hundred words, which small models circle in
        "yczhou001/LongBench-T2I",  # purple
        "HKUDS/ViMax",
        "AMAP-ML/VMBench",
        "f/prompts.chat",  # edits of a photo
        "google-gemini/cookbook",
        "GoogleCloudPlatform/generative-ai",
    ),
    "video": (
        "PKU-YuanGroup/ChronoMagic-Bench",  # time-lapses with one opening
        "google-deepmind/physics-IQ-benchmark",  # static shots of experiments
        "HKUDS/ViMax",
        "google-gemini/cookbook",
        "GoogleCloudPlatform/generative-ai",
    ),
    "design": ("1230young/bizgen", "OpenGVLab/GenExam"),  # slides of placeholders, diagrams
    "lettering": (
        "CodeGoat24/UniGenBench",
        "AIGText/GlyphControl-release",
        "X-Omni-Team/X-Omni",
        "zhaoshitian/LeX-Art",  # several texts at several places
    ),
    "scene": ("INK-USC/CommonGen", "globalwordnet/english-wordnet", "dariusk/corpora"),
    "tags": (
        "tategallery/collection",  # catalogue keywords, mostly of drawings
        "globalwordnet/english-wordnet",
        "rsek/datasworn",
        "NYPL-publicdomain/data-and-utilities",
    ),
}
LEAST, MOST = 12, 80  # words of an image prompt made from one for video
MOVES = re.compile(
    r"\b(video|camera|footage|clip|frames?|shot|scenes?|pans?|zooms?|tracking|transitions?|"
    r"time-?lapse|slow[- ]motion|begins?|starts?|then|suddenly|finally|gradually|slowly|captures?|"
    r"captured|moment|moves?|moving|motion|continues?|as (?:he|she|it|they|the)|while)\b",
    re.IGNORECASE,
)
WRITING = re.compile(
    r"[\"“”]|\b(texts?|letters?|lettering|reads|reading \W|says|saying|titled|captions?|logos?|"
    r"inscriptions?|slogans?|words?|labell?ed|in english)\b",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"”’]?\s*")
TEMPLATE = re.compile(r"\. (?:Realistic|Animated|CG|Cartoon|Indoor|Outdoor)[^.]*$")


def still(text: str) -> str:
    """The sentences that do not move, if the first does not, up to MOST words."""
    kept: list[str] = []
    for sentence in SENTENCE.findall(text):
        if MOVES.search(sentence):
            if not kept:
                break
            continue
        if len(" ".join([*kept, sentence]).split()) > MOST:
            break
        kept.append(sentence.strip())
    return " ".join(kept)


def good(row: dict[str, Any]) -> bool:
    """Whether its text is one to learn from."""
    task, source = row["task"], row["source"]
    if source.startswith(SOURCES_LEFT_OUT.get(task, ())):
        return False
    request, response = row["request"] or "", row["response"]
    if task in ("image", "video") and WRITING.search(response) and not WRITING.search(request):
        return False
    if "1Prompt1Story" in source and zlib.crc32(response.encode()) % 3:
        return False  # of one form, so a third of them
    return not (task == "video" and TEMPLATE.search(response) and len(response.split()) < 20)


def image_of(row: dict[str, Any]) -> str:
    """The image prompt in a prompt for a video; empty if there is none."""
    if row["task"] != "video" or not row["request"] or MOVES.search(row["request"]):
        return ""
    text = still(row["response"])
    return text if len(text.split()) >= LEAST else ""


def rows(folders: list[Path]) -> Iterator[dict[str, Any]]:
    for folder in folders:
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text("utf-8").splitlines():
                row = json.loads(line)
                if good(row):
                    yield row
                    if text := image_of(row):
                        image = {"id": f"{row['id']}-still", "task": "image", "kind": "derived"}
                        if good(picture := row | image | {"response": text}):
                            yield picture


def main() -> None:
    *folders, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True)
    write_jsonl(rows(folders), out / "samples.jsonl")


if __name__ == "__main__":
    main()
