"""Syntax of image tools in a request: kept from the model, and put back into its answer.

    <lora:x:0.8>   BREAK   --ar 16:9            tags, which say nothing that a model could use
    (word:1.2)  [a|b]  {a|b}  __wildcard__      constructs with words: the model gets these,
    [placeholder]  {placeholder}  ((word))      of alternatives the first

(AUTOMATIC1111's attention, alternation and extra networks, the choices and wildcards of
sd-dynamic-prompts, Midjourney's parameters.) A construct with words takes their place where the
answer has them, else it is added to the end. A tag that stood between words follows the word
that it followed; other tags are added to the end, parameters last. Each comes back as it was
written, once for each time that it was in the request.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from edge_slm_runtime.errors import BadSetting, EmptyRequest
from edge_slm_runtime.keeps import whole
from edge_slm_runtime.words import UNFINISHED_ANSWER

_FOUND = re.compile(
    r"""(?P<escaped>\\.)
    | (?P<tag> <[A-Za-z]\w*:[^<>]*> | (?<!\w)BREAK(?!\w))
    | (?P<wildcard> (?<!\w)__(?=[^\W_])(?:(?!__)[\w./*-])+__(?!\w))
    | (?P<parameter> (?<!\S)--(?:no\s+(?=[^\s-])(?:(?!\s--).)+
        | [A-Za-z][\w-]*(?:[ =](?:raw|[^\s-]*\d\S*|https?://\S+))?(?!\S)))
    | (?P<bracket>[(\[{])""",
    re.VERBOSE | re.DOTALL,
)
_CLOSERS = {")": "(", "]": "[", "}": "{"}
_WEIGHT = re.compile(r"(?::\s*-?\d*\.\d*|(?<!\d):\s*-?\d{1,2})\s*\)$")  # no 12:30, no 16:9
_WEIGHT_LENGTH = 16  # characters, more than any has
_LONGEST_NAME = 120  # characters between brackets that hold no alternatives
_INNERMOST = re.compile(r"[(\[{]([^()\[\]{}]*)[)\]}]")
_MOST = 64  # in a request; each is looked for in the answer
_DEEPEST = 8  # brackets in brackets whose words are found
_WORD = re.compile(r"[^\W_][\w'’-]*")
_SENTENCE_ENDS = (".", "!", "?", "…", ",", ";", ":")


@dataclass(slots=True)
class Slot:
    """words: where it belongs in an answer, nowhere if empty. construct: stands in their place;
    empty leaves them. tags: behind both."""

    words: str
    construct: str = ""
    tags: list[str] = field(default_factory=list)

    def filled(self, words: str) -> str:
        return " ".join([self.construct or words, *self.tags])

    def find(self, text: str, start: int) -> re.Match[str] | None:
        """In `text` from `start` on, whatever the case."""
        if not self.words:
            return None
        return whole(self.words, re.IGNORECASE).search(text, start)


class Shielded(NamedTuple):
    """text: a request without syntax. slots, tail: what to put back, and what to add."""

    text: str
    slots: tuple[Slot, ...] = ()
    tail: tuple[str, ...] = ()

    def restored(self, answer: str) -> str:
        """The answer with the syntax of the request."""
        return Placer(self).push(answer, last=True)


class Placer:
    """Puts the syntax back while the answer is written."""

    def __init__(self, shielded: Shielded) -> None:
        self._left = list(shielded.slots)
        self._tail = shielded.tail
        self._before = ""  # the last character that was given
        self._held = ""
        self._any = False

    def push(self, piece: str, last: bool) -> str:
        """What is sure of the text once `piece` has come: words that may still turn out to be
        those of a construct are held back."""
        text, done = self._before + self._held + piece, len(self._before)
        parts: list[str] = []
        while True:
            # Matches before this place cannot change when more text comes.
            decided = len(text) - (
                0 if last else max((len(s.words) for s in self._left), default=0)
            )
            found = [
                (match.start(), -match.end(), i, match)
                for i, slot in enumerate(self._left)
                if (match := slot.find(text, done)) and match.start() < decided
            ]
            if not found:
                break
            start, _, i, match = min(found)
            parts += text[done:start], self._left.pop(i).filled(match[0])
            done = match.end()
        end = max(done, decided)
        parts.append(text[done:end])
        self._before, self._held = text[max(0, end - 1) : end], text[end:]
        given = "".join(parts)
        self._any |= bool(given)
        return given + self._ending() if last else given

    def _ending(self) -> str:
        """What found no place."""
        constructs = [slot.filled("") for slot in self._left if slot.construct]
        tags = [tag for slot in self._left if not slot.construct for tag in slot.tags]
        ending = " ".join([", ".join(constructs), *tags, *self._tail]).strip()
        if not self._any or not ending:
            return ending
        comma = constructs and not self._before.endswith(_SENTENCE_ENDS)
        return f"{',' if comma else ''} {ending}"


def shield(request: str) -> Shielded:
    """A request as the model gets it. One without syntax is unchanged.

    Raises EmptyRequest when syntax is all that there is, BadSetting when there is too much.
    """
    slots: list[Slot] = []
    tail: list[str] = []
    parameters: list[str] = []
    plain: list[str] = []
    pieces = list(islice(_pieces(request), _MOST + 1))
    if not pieces:
        return Shielded(request)
    if len(pieces) > _MOST:
        raise BadSetting(
            f"the request has more than {_MOST} pieces of prompt syntax",
            "leave some out, or read them as text with syntax='none'",
        )
    done, behind, anchor = 0, len(request), ""
    for piece in reversed(pieces):  # tags behind the last word belong to the end
        if piece.words or _WORD.search(request, piece.end, behind):
            break
        behind = piece.start
    slot: Slot | None = None
    for piece in pieces:
        before = request[done : piece.start]
        if named := [word for word in _WORD.findall(before) if _telling(word)]:
            slot, anchor = None, named[-1]
        construct = request[piece.start : piece.end]
        if piece.words:
            slot = Slot(piece.words if _telling(piece.words) else "", construct)
            slots.append(slot)
        elif construct.startswith("--"):
            parameters.append(construct)
        elif piece.start >= behind or not (slot or anchor):
            tail.append(construct)
        else:
            if slot is None:
                slot = Slot(anchor)
                slots.append(slot)
            slot.tags.append(construct)
        plain += before, piece.words or (", " if construct == "BREAK" else " ")
        done = piece.end
    text = " ".join("".join([*plain, request[done:]]).split())
    text = re.sub(r" (?=[.;!?](?: |$))", "", re.sub(r"(?: ?,)+", ",", text)).strip(" ,;")
    if not re.search(r"\w", text):
        raise EmptyRequest(
            "the request has nothing but prompt syntax",
            "say what the prompt should be about, or read it as text with syntax='none'",
        )
    return Shielded(text, tuple(slots), (*tail, *parameters))


class _Piece(NamedTuple):
    start: int
    end: int
    words: str


def _pieces(text: str) -> Iterator[_Piece]:
    """The outermost constructs and their words."""
    closing = _closing(text)
    breaks = any(map(str.islower, text))  # where all is in capitals, BREAK is a word
    at = 0
    while match := _FOUND.search(text, at):
        start, at = match.span()
        kind = match.lastgroup
        if kind == "bracket":
            end = closing.get(start, start) + 1
            if end - start > 2 and _is_construct(text, start, end, closing):
                yield _Piece(start, end, _words_of(text[start:end]))
                at = end
        elif kind == "wildcard":
            yield _Piece(start, at, _words_of(match[0]))
        elif kind != "escaped" and (breaks or match[0] != "BREAK"):
            yield _Piece(start, at, "")


def _closing(text: str) -> dict[int, int]:
    """Place of each opening bracket → place of the one that closes it."""
    opened: dict[str, list[int]] = {opener: [] for opener in _CLOSERS.values()}
    pairs = {}
    for match in re.finditer(r"\\.|[()\[\]{}]", text, re.DOTALL):
        if match[0] in opened:
            opened[match[0]].append(match.start())
        elif match[0] in _CLOSERS and (starts := opened[_CLOSERS[match[0]]]):
            pairs[starts.pop()] = match.start()
    return pairs


def _is_construct(text: str, start: int, end: int, closing: dict[int, int]) -> bool:
    if text[start] == "(":
        weighted = _WEIGHT.search(text[max(start, end - _WEIGHT_LENGTH) : end])
        return bool(weighted) or (closing.get(start + 1) == end - 2 and text[start + 1] == "(")
    if text.find("|", start, end) >= 0:
        return True
    # JSON and what is long is text.
    return end - start - 2 <= _LONGEST_NAME and not re.search(r'["\n]', text[start:end])


def _words_of(construct: str) -> str:
    """What a construct says: of alternatives the first, of a wildcard's path the last name."""
    text = _FOUND.sub(_leaf, construct)
    for _ in range(_DEEPEST):
        text, count = _INNERMOST.subn(_first, text)
        if not count:
            break
    words = " ".join(text.split()).strip(" ,;")
    return words if re.search(r"\w", words) and not re.search(r"[()\[\]{}<>|]", words) else ""


def _leaf(match: re.Match[str]) -> str:
    if match.lastgroup == "wildcard":
        return re.sub(r"[\W_]+", " ", match[0].strip("_").rpartition("/")[2])
    return match[0] if match.lastgroup in ("bracket", "escaped") else " "


def _first(match: re.Match[str]) -> str:
    """Of `2$$a|b`, `0.5::a|0.5::b`, `a|b`, `a:b:0.5`, `a:1.2` the a."""
    options = [one for one in match[1].rpartition("$$")[2].split("|") if one.strip()]
    option = re.sub(r"^\s*[\d.]+::", "", options[0]) if options else ""
    if match[0][0] == "[":
        parts = [part for part in option.split(":") if part.strip(" .0123456789")]
        option = parts[0] if parts else option
    return re.sub(r":\s*-?[\d.]+\s*$", "", option)


def _telling(words: str) -> bool:
    """Whether words can be looked for: of those that are everywhere no place is theirs."""
    return any(word.lower() not in UNFINISHED_ANSWER for word in _WORD.findall(words))
