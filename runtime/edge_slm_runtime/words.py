"""English words that are seldom the last one: a text that ends in one reads as cut off.

The lists differ by what they judge. Those of training are part of how a model was made, so
that a recipe gives the same samples and rewards again only while they stay as they are.
"""

from __future__ import annotations

NEVER_LAST = frozenset("a an the and or but very of with into".split())  # of a sentence
_ALWAYS = NEVER_LAST | frozenset("as that which who his its their is are was were at from".split())
# Of a phrase: what follows its head.
AFTER_A_NOUN = frozenset(
    "in on at with of and or from to into under over near by beside behind between through "
    "across along inside outside above below around during after before like for who that which "
    "while as is are was were has have full made wearing holding without among against".split()
)
UNFINISHED_ANSWER = _ALWAYS | frozenset(
    "nor in on by to for without onto over under near behind beside between through than whose "
    "while where when be her this these those".split()
)
UNFINISHED_REQUEST = _ALWAYS | frozenset(
    "be have has had in on to for by whose her this over under".split()
)
# What the reward marks down; people do end titles and requests in "in", "on" or "by".
UNFINISHED_SAMPLE = _ALWAYS | frozenset(
    "nor without onto upon between among your our my be been has have had whose than if because "
    "while toward towards including featuring".split()
)
UNFINISHED_PHRASE = AFTER_A_NOUN | frozenset("a an the its their his her very but not".split())
