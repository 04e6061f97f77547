"""Image and video prompts around a request, of a quality as in `compose`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from edge_slm.distill.teachers.grammar.compose import (
    ENDS,
    Pools,
    Quality,
    commas,
    core,
    cut,
    pack,
    sentences,
    spare,
)
from edge_slm.distill.teachers.grammar.lexicon import (
    Deck,
    Slots,
    Table,
    Theme,
    articles,
    capital,
    expand,
    first_part,
    kind_index,
    kinds,
    lexicon,
    pick,
    read_theme,
    words_of,
)
from edge_slm_runtime.command import count_words


@lru_cache(maxsize=4096)
def _theme(request: str) -> Theme:
    return read_theme(request)


@dataclass
class Picture:
    """A subject with a setting, a light and a medium that go together."""

    lead: str
    theme: Theme
    setting: Table
    place: str
    light: str
    medium: Table
    own_medium: bool  # the request names it
    slots: Slots
    rng: random.Random

    def draw(self, entry: str) -> str:
        return expand(entry, self.rng, self.slots, self.theme.plural)


def picture(lead: str, theme: Theme, room: int, rng: random.Random) -> Picture:
    """Chooses a place if the request names none and there is room for one."""
    looks = lexicon("looks")
    settings = lexicon("settings")
    usual = theme.usual
    setting = theme.setting
    place = ""
    if usual and not theme.placed and room > 8 and rng.random() < 0.65:
        setting = setting or settings[pick(usual, rng)]
        place = pick(setting["places"], rng)
    lights = setting.get("lights") or (settings[usual[0]]["lights"] if usual else ("day", "dusk"))
    if theme.time and set(lights) & set(looks["times"]):
        lights = (theme.time,)
    light = pick(looks["lights"][pick(lights, rng)], rng)
    tokens = set(words_of(lead))
    mediums: list[Table] = list(looks["mediums"].values())
    named = [medium for medium in mediums if tokens & set(medium["keywords"])]
    medium = named[0] if named else mediums[int(rng.random() ** 1.5 * len(mediums))]
    own = setting.get("palettes", ()) if setting else ()
    it = f"the {theme.noun}" if theme.noun else "the scene"
    generic = looks["generic"]
    slots: Slots = {
        "it": it,
        "noun": theme.noun,
        "light": light,
        "mood": Deck(generic["moods"], rng),
        "palette": Deck(own or generic["palettes"], rng),
        "d": Deck(theme.kind.get("details") or generic["phrases"], rng),
        "s": Deck(setting.get("details") or generic["phrases"], rng),
        "with": Deck(medium["with"], rng),
        "after": Deck(medium["after"], rng),
    }
    return Picture(lead, theme, setting, place, light, medium, bool(named), slots, rng)


def subject(
    request: str, words: int, quality: Quality, rng: random.Random, invent: Callable[[], str]
) -> tuple[str, Theme]:
    """(beginning of the text, theme of its details)."""
    whole = cut(core(request), words)
    if quality == "best":
        return whole, _theme(whole)
    if quality == "middling" or rng.random() < 0.5:
        part = cut(first_part(whole), words)
        return part, Theme() if quality == "middling" else _theme(invent())
    other = cut(core(invent()), words)
    return other, _theme(other)


def scene_idea(rng: random.Random) -> str:
    """A subject, mostly with an action and a place that fit it."""
    kind = pick_kind(rng)
    idea = subject_idea(kind, rng)
    if kind.get("scenic"):
        return idea
    way = rng.random()
    if way < 0.1:
        beings = list(lexicon("beings").values())
        idea += " and " + subject_idea(beings[int(rng.random() * len(beings))], rng)
    elif way < 0.75:
        idea += " " + pick(kind["actions"], rng)
    if rng.random() < 0.6:
        idea += " " + pick(lexicon("settings")[pick(kind["settings"], rng)]["places"], rng)
    return idea


def subject_idea(kind: Table, rng: random.Random) -> str:
    """One of the kind's subjects, or one of its keywords with an adjective."""
    keyword = pick(kind["keywords"], rng)
    if kind.get("scenic") or kind_index()[keyword][1] or rng.random() < 0.45:
        return pick(kind["subjects"], rng)
    named = (
        "beings" if kind in lexicon("beings").values() else kind.get("adjectives", ("things",))[0]
    )
    return articles(f"a {pick(lexicon('looks')['adjectives'][named], rng)} {keyword}")


def picture_idea(rng: random.Random) -> str:
    """An idea of a picture, in one of the ways in which people type."""
    way = rng.random()
    kind = pick_kind(rng)
    if way < 0.12:  # keywords
        place = pick(lexicon("settings")[pick(kind["settings"], rng)]["places"], rng)
        parts = [subject_idea(kind, rng), place.split(" ", 1)[1], pick(_TIMES, rng)]
        return ", ".join(_bare(part) for part in parts[: rng.randint(2, 3)])
    if way < 0.24 and not kind.get("scenic"):  # a sentence
        start, action = subject_idea(kind, rng), pick(kind["actions"], rng)
        if start.startswith(("a ", "an ")) and " and " not in start and "ing " in action:
            return f"{capital(start)} is {action}."
    idea = scene_idea(rng)
    if rng.random() < 0.15:
        idea += " " + pick(_TIMES, rng)
    return _bare(idea) if way > 0.85 else idea


_TIMES = ("at dusk", "at dawn", "at night", "at sunset", "by moonlight", "early in the morning")


def _bare(text: str) -> str:
    first, _, rest = text.partition(" ")
    return rest if first in ("a", "an", "the") else text


def pick_kind(rng: random.Random) -> Table:
    tables: list[Table] = list(kinds().values())
    return tables[int(rng.random() * len(tables))]


def _about(theme: Theme, entries: Sequence[str], scenic: bool = False) -> Sequence[str]:
    """The entries without those that name a subject, if there is none to name."""
    if theme.noun and (scenic or not theme.kind.get("scenic")):
        return entries
    return [entry for entry in entries if "{it}" not in entry.lower()]


def image(request: str, words: int, quality: Quality, rng: random.Random) -> str:
    lead, theme = subject(request, words, quality, rng, lambda: scene_idea(rng))
    looks = lexicon("looks")
    prose = words > 55 or rng.random() * 60 < words - 18
    if quality == "middling":
        name, rest = ("image", "sentences") if prose else ("generic", "phrases")
        pools: Pools = [(looks[name]["boilerplate"], 1), (looks[name][rest], 0.2)]
        pools += [spare()] if prose else []
        units = pack(pools, words - count_words(lead), lambda e: expand(e, rng, {}), rng)
        return (sentences if prose else commas)(lead, units)
    room = words - count_words(lead)
    scene = picture(lead, theme, room, rng)
    medium, generic = scene.medium, looks["generic"]
    plain = not scene.own_medium and theme.phrase and quality == "best"
    before = pick(medium["before"], rng) if plain and room > 6 and rng.random() < 0.3 else ""
    if before:
        lead = f"{before} {lower(lead)}"
    lead = _placed(lead, scene)
    room = words - count_words(lead)
    if prose:
        return _paragraph(scene, lead, room, not before)
    named = ["{with}", "{with}, {with}"]
    if not before and not scene.own_medium:
        named = ["{after}", "{after}, {with}", "{after}, {with}, {with}"]
    details = theme.kind.get("details", ())
    pools = [
        (["with {d} and {d}"] if details and theme.phrase else [], 0.8),
        (["{d}"] * 6 if details else [], 1.2),
        (["{s}"] * 6 if scene.setting else [], 0.9),
        ([scene.light], 1.2),
        (["{palette}", "{mood} mood", "{mood} and {mood}"], 0.35),
        ([pick(generic["compositions"], rng)], 0.5),
        ([pick(named, rng)], 0.8),
        (generic["phrases"], 0.12),
    ]
    return commas(lead, pack(pools, room, scene.draw, rng))


def _placed(lead: str, scene: Picture) -> str:
    if not scene.place:
        return lead
    if lead.endswith(ENDS):
        return f"{lead} {capital(scene.place)}."
    return f"{lead} {scene.place}"


def _paragraph(scene: Picture, lead: str, room: int, name_medium: bool) -> str:
    """The picture in whole sentences."""
    still, theme, rng = lexicon("looks")["image"], scene.theme, scene.rng
    details = theme.kind.get("details")
    if details and theme.phrase and room > 12 and rng.random() < 0.6:
        opening = lead + articles(scene.draw(pick(still["opening"], rng)))
        lead, room = opening, room - count_words(opening) + count_words(lead)
    light = pick(_about(theme, still["light"], scenic=True), rng)
    pools: Pools = [
        (_about(theme, still["subject"], scenic=True) if details else [], 0.7),
        (theme.kind.get("sentences", ()) if theme.noun else [], 0.9),
        (_about(theme, still["setting"], scenic=True) if scene.setting else [], 0.9),
        (scene.setting.get("motions", ()), 0.6),
        ([light], 1),
        ([pick(still["style"], rng)], 0.6),
        (still["sentences"], 0.15),
        spare(),
        ([pick(still["medium"], rng)] if name_medium and not scene.own_medium else [], 0.7),
    ]
    return sentences(lead, pack(pools, room, scene.draw, rng))


def lower(text: str) -> str:
    """With a small first letter, if that is of an article or a number."""
    first = text.split(" ", 1)[0].lower()
    return text[:1].lower() + text[1:] if len(first) < 4 or first in ("three", "four") else text


# A request that says what the camera does is not contradicted.
_DIRECTED = frozenset(
    "camera zoom pan tilt shot view dolly tracking handheld static aerial timelapse "
    "close-up closeup pov footage".split()
)


def video(request: str, words: int, quality: Quality, rng: random.Random) -> str:
    lead, theme = subject(request, words, quality, rng, lambda: scene_idea(rng))
    camera = lexicon("looks")["camera"]
    room = words - count_words(lead)
    if quality == "middling":
        pools: Pools = [(camera["boilerplate"], 1), (camera["sentences"], 0.2), spare()]
        return sentences(lead, pack(pools, room, lambda e: expand(e, rng, {}), rng))
    scene = picture(lead, theme, room, rng)
    directed = not _DIRECTED.isdisjoint(words_of(request))
    if theme.phrase and not directed and room > 6 and rng.random() < 0.35:
        lead = _placed(f"{pick(camera['shots'], rng)} {lower(lead)}", scene)
    else:
        lead = _placed(lead, scene)
        open_end = not directed and not lead.endswith(ENDS)
        if open_end and words - count_words(lead) > 8 and rng.random() < 0.3:
            lead = f"{lead}, {pick(camera['after'], rng)}"
    room = words - count_words(lead)
    # One way for the camera to move; in a long shot, a second one.
    moves = [] if directed else rng.sample(_about(theme, camera["moves"]), 1 + (words > 90))
    middle: Pools = [
        (theme.kind.get("sentences", ()) if theme.noun else [], 1.2),
        (scene.setting.get("motions", ()), 1),
        (moves, 1.1),
        ([pick(_about(theme, camera["lights"], True), rng)], 1.1),
    ]
    rng.shuffle(middle)
    pools = [*middle, (camera["closing"], 0.4), (camera["sentences"], 0.12), spare()]
    return sentences(lead, pack(pools, room, scene.draw, rng))
