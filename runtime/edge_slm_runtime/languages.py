"""Whether a request reads as English, the one language that the commanded models have seen.

Judged are its letters and its commonest words; what stands in quotes, often a text to show, is
not. A few words tell nothing, and pass.
"""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»|„[^“”]*[“”]|(?<!\w)'[^']*'(?!\w)")
# Function words. What several languages share ("a", "in", "no", "do", "so") counts for none.
_ENGLISH = frozenset(
    "and are at been beside between by for from her his into its of off on that the their "
    "them there these they this those through to towards where which while who with without you "
    "your".split()
)
_OTHERS = frozenset(
    # German, Dutch
    "der das den dem ein eine einem einen einer eines und ist sind mit auf im zum zur von "
    "für bei nach über unter durch ohne nicht vor zwischen aus sich wird wie ihr ihre sein seine "
    "het een op met voor naar aan bij uit en zonder onder tussen zijn haar deze dit niet "
    # French, Spanish, Italian, Portuguese
    "un une au aux et est avec dans sous chez sans qui que où pour par sur ce cette ces ses leur "
    "très una unos unas es con para sobre sin bajo entre su sus muy junto desde hacia lo gli uno "
    "dal dalla nel nella nei nelle sul sulla che tra sotto sopra senza suo sua molto os um uma "
    "uns umas dos das na nos nas ao em com sem sob seu pelo pela "
    # Scandinavian, Polish, Turkish, Indonesian
    "och og på med till til det ett att ikke inte av som jest z nad pod przy bir ve ile yang dan "
    "dengan".split()
)
# Those of names ("Plaza de la Luz", "Playa del Carmen"), which count for one together.
_OF_NAMES = frozenset("de la le les el los las del du des al di da della dei il".split())
_LEAST = 2  # words of another language, or letters
_LONG = 4  # words; "crème de menthe" is English


def reads_as_english(request: str) -> bool:
    """False where the request is clearly in another language, by letters or words."""
    text = _QUOTED.sub(" ", unicodedata.normalize("NFKC", request))
    if sum(map(_is_foreign, text)) >= _LEAST:
        return False
    words = _WORD.findall(text.lower())
    seen = set(words)
    others, english = len(seen & _OTHERS) + bool(seen & _OF_NAMES), len(seen & _ENGLISH)
    if others > english and others >= _LEAST:
        return False
    accented = sum(not word.isascii() for word in seen - _OTHERS - _OF_NAMES)
    return english > 0 or len(words) < _LONG or others + accented < _LEAST


def _is_foreign(char: str) -> bool:
    """Whether a character is a letter that is not a Latin one."""
    if char < "\u0250" or unicodedata.category(char) not in ("Lu", "Ll", "Lt", "Lo"):
        return False
    return not unicodedata.name(char, "").startswith("LATIN")
