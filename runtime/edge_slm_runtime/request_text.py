"""The text of a request: what is refused, and what a commanded model sees of it."""

from __future__ import annotations

import re
import unicodedata

from edge_slm_runtime.errors import (
    ControlTokenInRequest,
    EmptyRequest,
    RequestNotText,
    RequestTooLong,
)

_LONGEST = 1 << 20  # characters; what a model's context holds is counted once it is clean

_CONTROL = re.compile(r"<\|[a-z_]+(?::[A-Za-z0-9_-]+)?\|>")
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U0001d159\U000e0000-\U000e0fff]"
)


def valid_request(request: str) -> str:
    """The request without white space at its ends. Raises RequestNotText, EmptyRequest,
    RequestTooLong."""
    if not isinstance(request, str):
        raise RequestNotText(f"the request must be str, got {type(request).__name__}")
    if len(request) > _LONGEST:  # to clean it takes 20 times its memory
        raise RequestTooLong(
            f"the request has {len(request)} characters, more than {_LONGEST}",
            "shorten the request",
        )
    try:
        request.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestNotText(
            f"the request is not valid UTF-8 at character {error.start}",
            "decode the bytes as UTF-8 before the call",
        ) from None
    if not (stripped := request.strip()):
        raise EmptyRequest("the request is empty", "say what the prompt should be about")
    if not any(map(is_visible, stripped)):
        raise EmptyRequest(
            "the request has only characters that cannot be seen",
            "say what the prompt should be about",
        )
    return stripped


def is_visible(char: str) -> bool:
    """False for spaces, controls, format characters, variation selectors and fillers."""
    invisible = unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp", "Zs")
    return not (invisible or _BLANK.match(char))


def clean_request(request: str) -> str:
    """The request as a commanded model sees it: stripped, white space folded.

    Raises RequestNotText, EmptyRequest, RequestTooLong, ControlTokenInRequest.
    """
    text = valid_request(request)
    if smuggled := _CONTROL.search(text):
        raise ControlTokenInRequest(
            f"the request holds the control token {smuggled[0]!r}",
            "ask for an outcome with task, words and relevance instead",
        )
    return " ".join(text.split())
