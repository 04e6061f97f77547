"""One sentence of keywords, in the manner of CommonGen (arXiv 1911.03705)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

from edge_slm.distill.teachers.grammar.compose import SLACK, Pools, Quality, pack
from edge_slm.distill.teachers.grammar.lexicon import (
    articles,
    capital,
    kind_index,
    lexicon,
    pick,
    plural_of,
)
from edge_slm_runtime.command import count_words

LONGEST = 22  # words; a longer sentence would have to say things twice

_DOUBLING = re.compile(r"[^aeiou]*[aeiou][^aeiouwxy]$")
_PERSON = re.compile(r"..(?:man|woman|ist|eer|ress|keeper|maker)$")
_PEOPLE_PLURAL = frozenset("people men women children kids fans friends players workers".split())


@lru_cache
def _frames() -> list[tuple[list[str], ...]]:
    """(agents, verb, objects, places) that go together."""
    lines = lexicon("scene")["frames"]["lines"]
    return [tuple(part.split() for part in line.split("|")) for line in lines]


@lru_cache
def _verbs() -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """verb → (t, i, b or u; preposition; usual objects)."""
    rows = (line.split("|") for line in lexicon("scene")["verbs"]["forms"])
    verbs = {verb: (form, prep, tuple(usual.split())) for verb, form, prep, usual in rows}
    for _, (verb,), objects, *_ in _frames():
        form, prep, usual = verbs[verb]
        verbs[verb] = (form, prep, (*usual, *objects))
    return verbs


@lru_cache
def _roles() -> dict[str, str]:
    """Noun or adjective → its list; the first list has precedence."""
    roles: dict[str, str] = {}
    for role, nouns in lexicon("scene")["nouns"].items():
        for noun in nouns:
            roles.setdefault(noun, role)
    for agents, _, objects, *places in _frames():
        for nouns, role in ((agents, "people"), (objects, "things"), (list(chain(*places)), "in")):
            for noun in nouns:
                roles.setdefault(noun, role)
    return roles


def ing(verb: str) -> str:
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if re.search(r"[^eyo]e$", verb):
        return verb[:-1] + "ing"
    return verb + (verb[-1] if _DOUBLING.fullmatch(verb) else "") + "ing"


def _many(noun: str) -> bool:
    return noun in _PEOPLE_PLURAL or (noun.endswith("s") and not noun.endswith(("ss", "us")))


@lru_cache(maxsize=4096)
def _known(noun: str) -> bool:
    return noun in kind_index() or any(noun in usual for _, _, usual in _verbs().values())


def keywords(request: str) -> list[str]:
    parts = request.split(",") if "," in request else request.split()
    words = [" ".join(part.split()).strip(".;:!?") for part in parts]
    return list(dict.fromkeys(filter(None, words))) or [request]


def scene(request: str, words: int, quality: Quality, rng: random.Random) -> str:
    """One sentence with all keywords, verbs in the form that fits."""
    if quality == "poor":
        given = keywords(keyword_idea(rng))
    else:
        given = keywords(request)
        if quality == "middling" and len(given) > 1:
            given = rng.sample(given, max(1, len(given) // 2))
    return _Sentence(given, rng).write(min(words, LONGEST))


class _Sentence:
    """Keywords by their part in a sentence; composing consumes them."""

    def __init__(self, given: Sequence[str], rng: random.Random) -> None:
        self.rng = rng
        self.caption = rng.random() < 0.2  # "a man riding a horse", without "is"
        self.agents: list[str] = []
        self.verbs: list[str] = []
        self.traits: list[str] = []  # adjectives of beings
        self.scenes: list[str] = []  # of places
        self.adjectives: list[str] = []
        self.places: list[tuple[str, str]] = []  # (role, noun)
        self.worn: list[str] = []
        self.things: list[str] = []
        self.times: list[str] = []
        roles, verbs = _roles(), _verbs()
        sure = any(word.lower() in verbs and word.lower() not in roles for word in given)
        people = any(
            roles.get(word.lower()) == "people" or _PERSON.search(word.lower()) for word in given
        )
        for word in given:
            low = word.lower()
            role = roles.get(low, "")
            if not role and low not in verbs and _PERSON.search(low):
                role = "people"
            if low in verbs and (not role or not (sure or self.verbs)):
                self.verbs.append(low)
            elif role == "people" or (role == "animals" and not people):
                self.agents.append(word)
            elif role in ("traits", "scenes", "adjectives"):
                getattr(self, role).append(word)
            elif not role and re.search(r"[^e](?:ate|ize|ise)$", low):
                self.adjectives.append(word + "d")
            elif role in ("in", "on", "at"):
                self.places.append((role, word))
            else:
                {"wear": self.worn, "times": self.times}.get(role, self.things).append(word)

    def write(self, words: int) -> str:
        if not self.agents and self.verbs:
            self.agents = [pick(("man", "woman", "boy", "girl", "child"), self.rng)]
        agent = self.agents.pop(0) if self.agents else ""
        start = self._act(agent) if agent else self._thing()
        role = _roles().get(agent.lower(), "people")
        extra = lexicon("scene")["extra"]
        manner = extra["animal" if role == "animals" else "person"] if self.verbs else ()
        watching = extra["watching"] if agent else ()
        pools: Pools = [(manner, 1), (extra["times"], 1), (watching, 0.7)]
        room = words - count_words(start)
        added: list[str] = []
        if room > SLACK:
            added = pack(pools, room, lambda entry: entry, self.rng, once=True)
        if added and not self.caption and added[0] in extra["times"] and self.rng.random() < 0.5:
            start = f"{added.pop(0)}, {start}"
        text = articles(", ".join([" ".join([start, *added[:1]]), *added[1:]]))
        return capital(text) + "."

    def _a(self, noun: str) -> str:
        """The noun with a suitable adjective and the right article."""
        last = noun.lower().split()[-1]
        role = _roles().get(last)
        told = noun
        if role in ("people", "animals"):
            told = f"{self.traits.pop(0)} {noun}" if self.traits else noun
        elif left := self.adjectives or self.traits or ([] if self.places else self.scenes):
            told = f"{left.pop(0)} {noun}"
        if _many(last) or role == "mass":
            return told
        return f"a {told}" if role or _known(last) else f"the {told}"

    def _act(self, agent: str) -> str:
        who = self._a(agent)
        if self.worn and "wear" not in self.verbs:
            who += f" wearing {self._a(self.worn.pop(0))}"
        many = _many(agent)
        now = not self.caption and self.rng.random() < 0.6  # "rides" rather than "is riding"
        verbs = self.verbs or [pick(("stand", "wait", "pause"), self.rng)]
        animal = _roles().get(agent.lower()) == "animals"
        done, held = "", ""
        for i, verb in enumerate(verbs):
            form = ing(verb) if not now else verb if many else plural_of(verb)
            if i and held and not self.things and _verbs()[verb][0] == "t":
                if animal:  # "catches the frisbee that someone throws"
                    done += f" that someone {plural_of(verb)}"
                else:
                    done += f" and {form} {'them' if _many(held) else 'it'}"
                continue
            held, rest = self._follow(verb, last=i == len(verbs) - 1) if self.verbs else ("", "")
            done += f"{' and ' if i else ''}{form}{rest}"
        auxiliary = "" if now or self.caption else " are" if many else " is"
        return f"{who}{auxiliary} {done}{self._rest()}"

    def _follow(self, verb: str, *, last: bool) -> tuple[str, str]:
        """(the object, everything after the verb)."""
        form, prep, usual = _verbs().get(verb, ("i", "by", ()))
        nouns = [*self.things, *self.worn, *(place for _, place in self.places)]
        fitting = [noun for noun in nouns if noun.lower() in usual]
        if form in "tb" and not fitting:
            fitting = self.things[:1] or self.worn[:1]
            if form == "t" and not fitting:
                reach = [noun for role, noun in self.places if role == "on"][: len(self.places) - 1]
                fitting = self.agents[:1] or reach or [pick(usual, self.rng)]
        if form != "i" and fitting:
            held = fitting[0]
            self._use(held)
            rest = f" {self._a(held)}"
            if last and prep == "with" and self.things:
                rest += f" with {self._a(self.things.pop(0))}"
            return held, rest
        if self.things:
            return "", f" {prep} {self._a(self.things.pop(0))}"
        # "slides down the rail", not "down the park"
        for role, place in sorted(self.places, key=lambda p: p[0] != "on"):
            if prep == role or (role == "on" and prep in ("down", "across", "along", "over")):
                self._use(place)
                return "", f" {prep} the {self._told(place)}"
        return "", ""

    def _use(self, noun: str) -> None:
        for nouns in (self.things, self.worn, self.agents):
            if noun in nouns:
                nouns.remove(noun)
                return
        self.places = [place for place in self.places if place[1] != noun]

    def _told(self, place: str) -> str:
        left = self.scenes or self.adjectives
        return f"{left.pop(0)} {place}" if left else place

    def _rest(self) -> str:
        """The keywords that are not used yet."""
        out = ""
        for nouns, words in (
            (self.agents, ("next to", "together with")),
            (self.things, ("with", "near", "beside")),
            (self.worn, ("with",)),
        ):
            if nouns:
                # What is unknown is perhaps nothing that one can stand near.
                link = pick(words, self.rng) if nouns[0].lower() in _roles() else words[0]
                told = [self._a(noun) for noun in nouns]
                listed = " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))
                out += f" {link} {listed}"
        for i, (role, place) in enumerate(self.places):
            out += f" {'near' if i else role} the {self._told(place)}"
        out += "".join(f" at {time}" for time in self.times[:1])
        left = [*self.traits, *self.adjectives, *self.scenes, *self.times[1:]]
        return f"{out}, looking {' and '.join(left)}" if left else out

    def _thing(self) -> str:
        """A sentence without an agent, as in a caption."""
        nouns = [*self.things, *self.worn, *(place for _, place in self.places)]
        if not nouns:
            return f"a picture{self._rest()}"
        self._use(nouns[0])
        start = pick(("{}", "{}", "a view of {}", "a close view of {}"), self.rng)
        return start.format(self._a(nouns[0])) + self._rest()


def keyword_idea(rng: random.Random) -> str:
    """Three to five keywords of things that go together."""
    nouns = lexicon("scene")["nouns"]
    frames = _frames()
    agents, verb, *more = frames[int(rng.random() * len(frames))]
    words = [pick(agents, rng), verb[0], *(pick(part, rng) for part in more)]
    if len(words) > 3 and rng.random() < 0.3:
        words.pop()
    if rng.random() < 0.6:
        placed = len(words) > 3
        described = nouns["scenes"] if placed and rng.random() < 0.4 else nouns["traits"][:12]
        words.append(pick(described, rng))
    rng.shuffle(words)
    return (", " if rng.random() < 0.6 else " ").join(words)
