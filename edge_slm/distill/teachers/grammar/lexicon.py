"""What the grammar teacher knows: entries of TOML files, how they are filled in, and
which of them fit a request.

An entry is text with `[this|that]` for a free choice, `{slot}` for a value ("{Slot}":
with a capital), and `stands/stand` for singular and plural.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from edge_slm_runtime.words import AFTER_A_NOUN, UNFINISHED_PHRASE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]

_MARKUP = re.compile(r"(\{\w+\}|\[[^\]]*\])")
_NUMBER = re.compile(r"([A-Za-z]+)/([A-Za-z]+)")
_ARTICLE = re.compile(r"\b([Aa]) (?=([aeiouhAEIOUH]\w*))")
_VOWEL_SOUND = re.compile(r"(?!uni|use|usu|eu|one\b|once\b|ukulele)[aeiou]|hour|honest|heir", re.I)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


@lru_cache
def lexicon(name: str) -> Table:
    """A file's tables; a block becomes its lines, a one-line string its words."""
    file = files("edge_slm") / "data" / "teacher" / "lexicon" / f"{name}.toml"
    table: Table = _entries(tomllib.loads(file.read_text("utf-8")))
    return table


def _entries(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _entries(item) for key, item in value.items()}
    if isinstance(value, str):
        return tuple(value.strip().split("\n") if "\n" in value else value.split())
    return value


@cache
def _parts(entry: str, plural: bool) -> tuple[str | tuple[str, ...], ...]:
    """Literal text, ("slot",) or choices, in turn."""
    numbered = _NUMBER.sub(r"\2" if plural else r"\1", entry)
    parts: list[str | tuple[str, ...]] = []
    for part in _MARKUP.split(numbered):
        if part[:1] == "{":
            parts.append((part[1:-1],))
        elif part[:1] == "[":
            parts.append(("", *part[1:-1].split("|")))
        elif part:
            parts.append(part)
    return tuple(parts)


@cache
def least_words(entry: str) -> int:
    """How many words the entry has whatever is drawn."""
    return len(_MARKUP.sub(lambda part: "x" if part[0][0] == "{" else "", entry).split())


def pick(options: Sequence[str], rng: random.Random) -> str:
    return options[int(rng.random() * len(options))]


class Deck:
    """Entries drawn in a random order, none twice before all have been drawn."""

    def __init__(self, entries: Sequence[str], rng: random.Random) -> None:
        self._entries, self._rng = entries, rng
        self._left: list[str] = []

    def draw(self) -> str:
        if not self._left:
            self._left = list(self._entries)
        return self._left.pop(int(self._rng.random() * len(self._left)))


Slots = Mapping[str, "str | Deck"]  # a string is used as it is


def expand(entry: str, rng: random.Random, slots: Slots, plural: bool = False) -> str:
    """The entry, filled in."""
    out: list[str] = []
    for part in _parts(entry, plural):
        if isinstance(part, str):
            out.append(part)
        elif part[0]:
            value = slots[part[0].lower()]
            if isinstance(value, Deck):
                value = expand(value.draw(), rng, slots, plural)
            out.append(capital(value) if part[0][0].isupper() else value)
        else:
            out.append(expand(pick(part[1:], rng), rng, slots, plural))
    return "".join(out)


def capital(text: str) -> str:
    """With a capital first letter, where it has one that is the same letter."""
    first = text[:1].upper()
    return first + text[1:] if first.lower() == text[:1] else text


def articles(text: str) -> str:
    """ "a old" becomes "an old"."""
    if "a " not in text and "A " not in text:
        return text
    return _ARTICLE.sub(lambda m: m[1] + ("n " if _VOWEL_SOUND.match(m[2]) else " "), text)


def plural_of(noun: str) -> str:
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:s|x|z|ch|sh)$", noun) else "s")


def words_of(text: str) -> list[str]:
    """Words without punctuation, in lower case."""
    return _WORD.findall(text.lower().replace("'s", "").replace("’s", ""))


# ---- what a request is about

_IRREGULAR = "people men women children wolves leaves geese mice sheep mothers sisters".split()
_FINITE = frozenset("is are was were has have had can will does do did am be".split())
_COUNTS = frozenset("two three four five six several many some both".split())
_FLAT = frozenset("logo icon poster emblem sticker pattern label badge font typography".split())
_PLACING = frozenset(
    "in on at under inside near over through across above below beside behind into along "
    "underwater outside".split()
)


@dataclass(frozen=True)
class Theme:
    """What a request is about, as far as the lexicons know.

    kind, setting: their tables, or {}. usual: names of settings that suit the kind.
    noun: what the request calls its subject, "" if not found. time: a group of lights.
    placed: the request says where it plays. phrase: the request is a noun phrase, so
    "a photo of" may stand before it.
    """

    kind: Table = field(default_factory=dict)
    setting: Table = field(default_factory=dict)
    usual: tuple[str, ...] = ()
    noun: str = ""
    plural: bool = False
    time: str = ""
    placed: bool = False
    phrase: bool = False


@lru_cache
def kinds() -> Table:
    return {**lexicon("beings"), **lexicon("things")}


def _index(tables: Iterable[Table]) -> dict[str, tuple[Table, bool]]:
    """By keyword: its table, and whether it is a plural. The first table wins."""
    found: dict[str, tuple[Table, bool]] = {}
    for table in tables:
        for word in (*table["keywords"], *table.get("hints", ())):
            many = word in _IRREGULAR or (word[-1] == "s" and word[-2] not in "sui")
            found.setdefault(word, (table, many))
            found.setdefault(plural_of(word), (table, True))
    return found


@lru_cache
def kind_index() -> dict[str, tuple[Table, bool]]:
    return _index(kinds().values())


@lru_cache
def setting_index() -> dict[str, tuple[Table, bool]]:
    return _index(lexicon("settings").values())


@lru_cache
def _time_index() -> dict[str, str]:
    return {word: time for time, given in lexicon("looks")["times"].items() for word in given}


@lru_cache
def _verbs() -> frozenset[str]:
    """Third person forms, to tell "a dog runs" from "a pair of shoes"."""
    forms = lexicon("scene")["verbs"]["forms"]
    return frozenset(plural_of(line.split("|")[0]) for line in forms)


def read_theme(request: str) -> Theme:
    """Keywords decide; a subject that no lexicon knows is found by its place."""
    tokens = words_of(request)
    index = kind_index()
    found = [i for i, token in enumerate(tokens) if token in index]
    # Of "apple tree", the last noun; of a landscape with a fox, the fox.
    found = [i for i in found if i + 1 not in found]
    # Of "a bowl of soup", the soup.
    found = [i for i in found if tokens[i + 1 : i + 2] != ["of"]] or found
    things = [i for i in found if not index[tokens[i]][0].get("scenic")]
    head = next(iter(things or found), None)
    phrase, own, plural, end = _noun_phrase(request, tokens)
    kind: Table = {}
    noun = own
    # Of "a robot on a hill", the robot, even if only the hill were known.
    if head is not None and (not own or head < end or tokens[end : end + 1] == ["of"]):
        noun = tokens[head]
        kind, plural = index[noun]
    settings = setting_index()
    places = [i for i, token in enumerate(tokens) if token in settings]
    # Of "a cabin in the snow", the snow; of "a cabin", the cabin; whales are in the sea.
    told = [i for i in places if _PLACING & set(tokens[max(0, i - 6) : i])]
    other = [i for i in places if tokens[i] != noun]
    where = next(iter(told or other[::-1] or places), None)
    setting: Table = {} if where is None else settings[tokens[where]][0]
    suited = [set(index[tokens[i]][0]["settings"]) for i in things]
    usual = tuple(s for s in kind.get("settings", ()) if all(s in other for other in suited))
    if len(usual) == 1 and kind.get("settings") == usual:
        setting = lexicon("settings")[usual[0]]
    times = _time_index()
    return Theme(
        kind=kind,
        setting=setting,
        usual=usual or kind.get("settings", ()),
        noun=noun,
        plural=plural,
        time=next((times[t] for t in tokens if t in times), ""),
        placed=bool(kind.get("scenic") or other)
        or any(token in _PLACING or token in _FLAT for token in tokens),
        phrase=phrase,
    )


def _noun_phrase(request: str, tokens: list[str]) -> tuple[bool, str, bool, int]:
    """(is it one, its head, is that plural, words up to there).

    Doubt says no: every form fits a clause too.
    """
    nothing = (False, "", False, 0)
    if not tokens or tokens[0] not in {"a", "an", "the", *_COUNTS}:
        return nothing
    many = tokens[0] in _COUNTS
    inner = words_of(re.split(r"[,;:(\"“]", request)[0])
    end = next(
        (i for i, t in enumerate(inner) if i and (t in AFTER_A_NOUN or t.endswith("ing"))),
        len(inner),
    )
    if not 2 <= end <= 5 or re.search(r"[.!?;:]", request):
        return nothing
    last = inner[end - 1]
    if many != (last.endswith("s") or last in _IRREGULAR) and tokens[0] != "the":
        return nothing
    clause = any(t in _FINITE or t in _verbs() for t in tokens)
    if clause and last in _verbs():
        return nothing
    return not clause, last, many or (tokens[0] == "the" and last.endswith("s")), end


def without_tail(text: str) -> str:
    """The text without last words that point at something cut off."""
    words = text.split()
    while len(words) > 1 and words[-1].lower().strip(",;:") in UNFINISHED_PHRASE:
        words.pop()
    return " ".join(words).rstrip(",;:")


def first_part(text: str) -> str:
    """Its first phrase: what is left when one stops listening."""
    words = text.split()
    for i, word in enumerate(words[1:], 1):
        if i > 1 and (word.lower() in AFTER_A_NOUN or word.lower().endswith("ing")):
            return without_tail(" ".join(words[:i]))
        if word.endswith((",", ".", ";", ":")) and i + 1 < len(words):
            return without_tail(" ".join(words[: i + 1]).rstrip(".,;:"))
    return without_tail(" ".join(words[: max(1, (len(words) + 1) // 2)]))
