"""Tags for a title or the name of an icon, and titles of art for their medium and tags."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache

from edge_slm.distill.teachers.grammar.compose import Quality
from edge_slm.distill.teachers.grammar.lexicon import (
    Deck,
    articles,
    capital,
    expand,
    kind_index,
    kinds,
    lexicon,
    pick,
    setting_index,
    words_of,
)
from edge_slm.distill.teachers.grammar.pictures import pick_kind
from edge_slm_runtime.command import count_words

MOST_TAGS, LONGEST_TITLE = 24, 11  # words


@lru_cache
def _icons() -> dict[str, tuple[str, ...]]:
    rows = (line.split("|") for line in lexicon("short")["tags"]["icons"])
    return {name: tuple(tags.split()) for name, tags in rows}


def _content(request: str) -> list[str]:
    """The content words, without a medium in brackets."""
    text = re.sub(r"\([^)]*\)", " ", request)
    text = re.sub(r"^\s*icon:", " ", text)
    drop = set(lexicon("short")["tags"]["drop"])
    return list(dict.fromkeys(word for word in words_of(text) if word not in drop))


def tags(request: str, words: int, quality: Quality, rng: random.Random) -> str:
    """Comma-separated tags, those of the request first."""
    data = lexicon("short")["tags"]
    words = min(words, MOST_TAGS)
    own = _content(request if quality != "poor" else tags_idea(rng))
    found: list[str] = []
    more: list[str] = []
    for word in own:
        found += _icons().get(word, ())
        for index in (kind_index(), setting_index()):
            if word in index:
                table = index[word][0]
                found += rng.sample(table["tags"], 4)
                more += [*table["tags"], *rng.sample(table["keywords"], 4)]
    if quality == "middling":
        own, found, more = own[: max(1, len(own) // 2)], [], []
    rng.shuffle(found)
    unique = dict.fromkeys([*own, *found]) or {request.strip(): None}
    if len(unique) < words:
        spare = [tag for table in kinds().values() for tag in table["tags"]]
        more += [*rng.sample(data["generic"], 6), *rng.sample(spare, len(spare))]
        unique |= dict.fromkeys(more)
    return ", ".join(list(unique)[: max(1, words)])


def tags_idea(rng: random.Random) -> str:
    data = lexicon("short")
    if rng.random() < 0.3:
        names = rng.sample(data["tags"]["icons"], 2)
        shown = [name.split("|")[0] for name in names][: 1 if rng.random() < 0.25 else 2]
        return "icon: " + " ".join(shown)
    text = expand(pick(data["titles"]["patterns"], rng), rng, _title_slots((), rng))
    if rng.random() < 0.7:
        text += f" ({pick(data['tags']['mediums'], rng)})"
    return articles(text)


def _title_slots(nouns: Sequence[str], rng: random.Random) -> dict[str, str | Deck]:
    data = lexicon("short")["titles"]
    names = [title_case(noun) for noun in nouns] or [
        title_case(noun) for noun in rng.sample(data["subjects"], 3)
    ]
    third = names[2] if len(names) > 2 else title_case(pick(data["subjects"], rng))
    return {
        "a": names[0],
        "b": names[1] if len(names) > 1 else third,
        "c": third,
        "time": Deck(data["times"], rng),
        "last": Deck(data["lasts"], rng),
    }


def title_case(text: str) -> str:
    return " ".join(capital(word) for word in text.split())


_NOT_NOUNS = re.compile(r".*(?:/|ing$|ed$|ant$|\(|\d)")


def title(request: str, words: int, quality: Quality, rng: random.Random) -> str:
    """A title of art, made from some of its tags."""
    data = lexicon("short")["titles"]
    words = min(words, LONGEST_TITLE)
    if quality == "poor":
        request = title_idea(rng)
    listed = [" ".join(tag.split()) for tag in request.split(";")[-1].split(",")]
    described = {*data["moods"], *lexicon("scene")["nouns"]["adjectives"]}
    simple = [tag for tag in listed if tag and count_words(tag) <= 2 and not _NOT_NOUNS.match(tag)]
    nouns = [tag for tag in simple if tag not in described and tag not in data["vague"]]
    nouns = nouns or simple or _content(request) or listed
    if quality == "middling" and rng.random() < 0.8:
        fitting = [t for t in data["generic"] if abs(count_words(t) - words) <= 3]
        if fitting:
            return pick(fitting, rng)
    chosen = rng.sample(nouns, min(len(nouns), 3))
    if quality == "middling":
        chosen = chosen[:1]
    slots = _title_slots(chosen, rng)
    for slot in ("time", "last"):  # what the tags say of it comes first
        if said := [title_case(tag) for tag in listed if title_case(tag) in data[f"{slot}s"]]:
            slots[slot] = said[0]
    entries = data["one"] if len(chosen) == 1 else (*data["two"], *data["one"])
    best = ""
    for entry in rng.sample(entries, len(entries)):
        text = articles(expand(entry, rng, slots))
        if not best or abs(count_words(text) - words) < abs(count_words(best) - words):
            best = text
        if abs(count_words(best) - words) <= 1:
            break
    room = words - count_words(best)
    for entry in rng.sample(data["tails"], len(data["tails"])):
        tail = expand(entry, rng, slots)
        if room > 2 and count_words(tail) <= room + 1:
            best, room = best + tail, room - count_words(tail)
    return best


def title_idea(rng: random.Random) -> str:
    """A medium and tags, as museums write them."""
    data = lexicon("short")
    kind = pick_kind(rng)
    found = {*rng.sample(kind["tags"], 2), *rng.sample(data["titles"]["subjects"], 2)}
    if rng.random() < 0.6:
        found.add(pick(data["titles"]["moods"], rng))
    listed = sorted(found)
    rng.shuffle(listed)
    return f"{pick(data['tags']['mediums'], rng)}; {', '.join(listed)}"
