"""Lettering and design prompts around a request, of a quality as in `compose`."""

from __future__ import annotations

import random
import re

from edge_slm.distill.teachers.grammar.compose import (
    SLACK,
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
    Table,
    Theme,
    articles,
    capital,
    expand,
    first_part,
    lexicon,
    pick,
    words_of,
)
from edge_slm.distill.teachers.grammar.pictures import picture
from edge_slm_runtime.command import count_words


def lettering_idea(rng: random.Random) -> str:
    data = lexicon("lettering")
    surfaces = list(data["surfaces"].values())
    slots = {name: Deck(entries, rng) for name, entries in data["slots"].items()}
    return expand(pick(surfaces[int(rng.random() * len(surfaces))]["words"], rng), rng, slots)


def lettering(request: str, words: int, quality: Quality, rng: random.Random) -> str:
    """An image prompt for a picture that shows the words of the request, in quotes."""
    looks = lexicon("looks")
    surfaces: list[Table] = list(lexicon("lettering")["surfaces"].values())
    shown = cut(request, words)
    tokens = set(words_of(shown))
    fitting = [s for s in surfaces if tokens & set(s["keywords"])] or surfaces
    if quality == "middling":
        shown = first_part(shown)
    elif quality == "poor":
        shown, fitting = cut(lettering_idea(rng), words), surfaces
    surface = fitting[int(rng.random() * len(fitting))]
    quoted = f"“{shown}”" if '"' in shown else f'"{shown}"'
    said = f"the {'word' if count_words(shown) == 1 else 'words'} {quoted}"
    letters = pick(surface["letters"], rng)
    where = pick(surface["scenes"], rng)
    if quality == "middling":
        leads = [f"a nice picture with {said}", said]
    else:
        leads = [*_wordings(where, said, quoted, letters, rng), f"{said} {letters}", said]
    leads = [lead for lead in leads if count_words(lead) <= words + SLACK] or [quoted]
    room = words - count_words(leads[0])
    generic = looks["generic"]
    if quality == "middling":
        pools: Pools = [(generic["boilerplate"], 1), (generic["phrases"], 0.2)]
        pools.append((generic["compositions"], 0.02))  # for who asks for more than these have
        return commas(leads[0], pack(pools, room, lambda e: expand(e, rng, {}), rng))
    theme = Theme(setting={"lights": surface.get("lights", ("day", "dusk"))}, placed=True)
    scene = picture(leads[0], theme, 0, rng)
    if words > 70 or (room > 10 and rng.random() < 0.35):
        prose, still = lexicon("lettering")["prose"], looks["image"]
        slots = {**scene.slots, "d": Deck(surface["details"], rng)}
        light = pick([entry for entry in still["light"] if "{it}" not in entry], rng)
        pools = [
            (prose["around"], 1),
            (prose["letters"], 0.4),
            ([light], 1),
            ([pick(still["style"], rng)], 0.5),
            (still["sentences"], 0.1),
            spare(),
            ([pick(still["medium"], rng)], 0.7),
        ]
        return sentences(leads[0], pack(pools, room, lambda e: expand(e, rng, slots), rng))
    pools = [
        (surface["details"], 1.2),
        ([scene.light], 0.8),
        (["{palette}", "{mood} mood"], 0.35),
        ([pick(generic["compositions"], rng)], 0.4),
        ([pick(("{after}", "{after}, {with}", "{after}, {with}, {with}"), rng)], 0.6),
        (generic["phrases"], 0.12),
    ]
    return commas(leads[0], pack(pools, room, scene.draw, rng))


def _wordings(where: str, said: str, quoted: str, letters: str, rng: random.Random) -> list[str]:
    """Ways to say that `letters` on a surface show the words."""
    wordings = [
        f"{where} with {said} {letters}",
        f"{said} {letters}, on {where}",
        f"{where}, and on it {said} {letters}",
        f"{where} with {quoted} {letters}",
        f"{where} bearing {said} {letters}",
        f"{said} on {where}, {letters}",
    ]
    rng.shuffle(wordings)
    return wordings


_MAKE = re.compile(
    r"(?:please )?(?:create|design|make|craft|produce|develop|generate|build|prepare) "
    r"(?:me |us )?(an? )",
    re.IGNORECASE,
)
_PROMOTE = re.compile(
    r"(?:advertise|promote|announce|celebrate|introduce|invite|showcase|present|highlight|"
    r"encourage|welcome|thank|remind|share|inform|offer|sell)\b",
    re.IGNORECASE,
)


def design_idea(rng: random.Random) -> str:
    data = lexicon("design")
    topics = list(data["topics"].values())
    topic = topics[int(rng.random() * len(topics))]
    formats = data["any"]["formats"]
    slots = {
        "format": pick(formats, rng),
        "subject": pick(topic["subjects"], rng),
        "palette": pick(topic["palettes"], rng),
        "tagline": pick(topic["taglines"], rng),
        "style": pick(data["any"]["styles"], rng),
        "mood": pick(data["any"]["moods"], rng),
    }
    return articles(capital(expand(pick(data["any"]["briefs"], rng), rng, slots)))


def design(request: str, words: int, quality: Quality, rng: random.Random) -> str:
    data = lexicon("design")
    common = data["any"]
    if quality == "poor":
        request = design_idea(rng)
    brief = core(request)
    tokens = words_of(brief)
    form = next((token for token in tokens if token in common["forms"]), "")
    tokens = [token for token in tokens if token not in common["forms"]]
    adjective = pick(common["adjectives"], rng)
    made, promoted = _MAKE.match(brief), _PROMOTE.match(brief)
    if quality == "middling":
        made = promoted = None
        brief = first_part(brief[m.end(1) - len(m[1]) :] if (m := _MAKE.match(brief)) else brief)
    if made:
        # An adjective of ours goes before "Facebook post", not before another one.
        rest = brief[made.end() :]
        free = not set(words_of(rest)[:2]).isdisjoint(common["forms"])
        lead = f"{articles('A ' + adjective) if free else capital(made[1].strip())} {rest}"
    elif promoted:
        form = form or pick(("poster", "flyer", "banner"), rng)
        lead = f"{articles('A ' + adjective)} {form} to {brief[:1].lower()}{brief[1:]}"
    elif quality == "middling" or form or brief.lower().startswith(("a ", "an ", "the ")):
        lead = brief
    else:
        form = pick(("poster", "flyer", "banner", "cover"), rng)
        lead = f"{articles('A ' + adjective)} {form} on the theme: {brief}"
    lead = lead if count_words(lead) <= words + SLACK else cut(brief, words)
    room = words - count_words(lead)
    if quality == "middling":
        pools: Pools = [(common["boilerplate"], 1), (common["closing"], 0.2), spare()]
        slots: dict[str, str | Deck] = {"it": "the design", "mood": "modern"}
        return sentences(lead, pack(pools, room, lambda e: expand(e, rng, slots), rng))
    counted = [
        (len(set(tokens) & set(topic["keywords"])), topic) for topic in data["topics"].values()
    ]
    hits, topic = max(counted, key=lambda item: item[0])
    topic = topic if hits else {}
    slots = {
        "it": f"the {form or 'design'}",
        "image": Deck(topic.get("imagery", common["images"]), rng),
        "palette": Deck(topic.get("palettes", lexicon("looks")["generic"]["palettes"]), rng),
        "tagline": Deck(topic.get("taglines", [""]), rng),
        "type": Deck(common["types"], rng),
        "mood": Deck(common["moods"], rng),
    }
    coloured = not set(tokens).isdisjoint(common["colours"]) or any(
        palette in brief for palette in topic.get("palettes", ())
    )
    worded = not topic or any(mark in f" {brief}" for mark in ('"', "“", " '", " ‘"))
    pools = [
        ([pick(common["imagery"], rng)], 1.2),
        ([pick(common["second"], rng)], 0.4),
        (common["layout"], 1),
        ([] if worded else [pick(common["taglines"], rng)], 0.8),
        ([] if coloured else [pick(common["colors"], rng)], 0.9),
        (common["closing"], 0.2),
        spare(),
    ]
    return sentences(lead, pack(pools, room, lambda e: expand(e, rng, slots), rng))
