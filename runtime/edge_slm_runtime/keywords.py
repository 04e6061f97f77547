"""Content words of texts, and the share of a request's that its answer has."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

WORD = re.compile(r"\w+(?:['’]\w+)*")
_STOP = frozenset(
    "a about above after all along also am among an and any are around as at be because been "
    "before being below beside between both but by can could did do does doing during each few "
    "for from had has have having he her here hers him his how i if in inside into is it its "
    "it's just let me more most my near no nor not of off on onto or other our out outside over "
    "own same she should so some such than that the their them then there these they this those "
    "through to too towards under until up upon us very was we were what when where which while "
    "who whom whose will with within without would you your".split()
)
# Words that ask for a prompt; the response need not repeat them.
_ASKING = frozenset("creat featur generat includ mak pleas us use".split())  # stems
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot",
    "teeth": "tooth", "mice": "mouse", "geese": "goose", "wolves": "wolf", "leaves": "leaf",
    "knives": "knife", "shelves": "shelf", "ran": "run", "sat": "sit", "stood": "stand",
    "flew": "fly", "held": "hold", "wore": "wear", "worn": "wear", "rode": "ride",
}  # fmt: skip


def words_of(text: str) -> list[str]:
    """The words of `text` in order: lower case, without accents and punctuation."""
    text = text.lower()
    if not text.isascii():
        folded = unicodedata.normalize("NFKD", text)
        text = "".join(char for char in folded if not unicodedata.combining(char))
    return WORD.findall(text)


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """Plural, possessive, -ing and -ed removed, much as in step 1 of Porter (1980).

    Only for comparing: "cities", "city" → "citi"; "running", "runs" → "run".
    """
    if len(word) > 30:  # not a word, and slow in the patterns below
        return word
    word = re.sub(r"['’]s?$", "", word)
    word = _IRREGULAR.get(word, word)
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if (match := re.fullmatch(r"(\w*[aeiouy]\w+?)(?:ing|ed)", word)) and len(match[1]) > 2:
        word = match[1]
        if word[-1] == word[-2] and word[-1] not in "lsz":
            word = word[:-1]
    # "house" and "housing", "city" and "cities" are equal without their last letter.
    word = re.sub(r"ie$|y$", "i", word)
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def content_stems(text: str) -> list[str]:
    """The stems of the content words of `text`, each once, in order."""
    stems = (stem(word) for word in words_of(text) if word not in _STOP)
    return [s for s in dict.fromkeys(stems) if s not in _ASKING]


def repeated_share(request: str, text: str) -> float:
    """Share of the content words of `text` that say again, in any inflection, what it has said;
    words of the request may come again."""
    stems = [stem(word) for word in words_of(text) if word not in _STOP]
    own = set(content_stems(request))
    repeated = sum(one not in own and one in stems[:at] for at, one in enumerate(stems))
    return repeated / len(stems) if stems else 0.0


def coverage(request: str, response: str) -> float:
    """Share of the content words of the request that the response has, in any inflection.

    1 for a request without content words.
    """
    wanted = content_stems(request)
    have = {stem(word) for word in words_of(response)}
    text = response.lower()
    # Scripts without spaces between words are searched, not split.
    covered = sum(word in have or (not word.isascii() and word in text) for word in wanted)
    return covered / len(wanted) if wanted else 1.0
