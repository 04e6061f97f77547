"""From a request to the plan of its answer: everything that can be wrong with it is found here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from edge_slm_runtime.bans import Bans, bans_of, units
from edge_slm_runtime.bundle import Manifest
from edge_slm_runtime.choices import Choices
from edge_slm_runtime.command import is_count
from edge_slm_runtime.deltas import Adapter
from edge_slm_runtime.engines.base import Engine
from edge_slm_runtime.errors import BadSetting, NotSupportedByEngine, RequestTooLong, shown
from edge_slm_runtime.keeps import Keeps, texts_to_show
from edge_slm_runtime.languages import reads_as_english
from edge_slm_runtime.length import tolerance
from edge_slm_runtime.lexicon import KnownWords
from edge_slm_runtime.plan import Plan
from edge_slm_runtime.prompt_syntax import Shielded, shield
from edge_slm_runtime.ranking import MOST
from edge_slm_runtime.records import Request
from edge_slm_runtime.request_text import clean_request
from edge_slm_runtime.restating import beginnings
from edge_slm_runtime.sampling import Sampling
from edge_slm_runtime.text import TextCodec

_JUDGING = 2  # tokens that judging an answer adds: a full stop and the end token
_LEAST_ROOM = 16  # tokens that must be left for an answer of no asked length
_STOPS_MAX, _BANS_MAX, _KEEPS_MAX = 64, 10_000, 16  # all stops are looked for after every token
_CHOICES_MAX = 256
_LONGEST_TEXT = 256  # characters of a stop, ban, keep or choice
_DEADLINE_MAX = 1e9  # ms
_TOKENS_PER_WORD = 1.5  # of English under a small vocabulary; for the check beforehand only


def plan_of(
    request: Request,
    manifest: Manifest,
    codec: TextCodec,
    engine: Engine,
    lexicon: Sequence[bytes] = (),
    adapters: Mapping[str, Adapter] = MappingProxyType({}),
) -> Plan:
    """What the model is given for a request, and the limits of its answer.

    lexicon: of the bundle; empty where it has none. adapters: by name; of several for a
    task the last is taken. Raises as `SLM.generate`.
    """
    command = manifest.prompt.check(request.command)
    sampling = request.sampling
    engine.check(sampling)
    stop, ban, keep, choices = _wording(request)
    _check_settings(request)
    logprobs = request.logprobs or request.best_of > 1
    if (ban or keep or choices or logprobs) and not engine.constrains:
        what = "ban, keep or choose words" if ban or keep or choices else "report logprobs"
        raise NotSupportedByEngine(
            f"{engine.name} cannot {what}", "load engine onnxruntime or numba"
        )
    adapter = _adapter(request, command.commanded.task, adapters, engine)
    told = Shielded(request.request)
    if request.syntax == "keep" and manifest.prompt.schema:
        told = shield(clean_request(request.request))
    prompt = codec.prompt(told.text, command.commanded)
    words = command.words if request.keep_length and not choices else None
    levels = _levels(manifest, codec) if logprobs else ()
    positions = manifest.model.positions - (_JUDGING if levels else 0)
    budget, limit = _budget(len(prompt), positions, request.max_new_tokens, command.words)
    if keep:
        _check_room(Keeps(keep, codec.encode), keep, words, budget)
    if choices and (longest := Choices(choices, codec.encode).longest) > budget:
        raise BadSetting(
            f"choices take up to {longest} tokens, more than the {budget} of the answer",
            "shorten them, or allow more tokens",
        )
    warnings = (*command.warnings, *_needless(sampling))
    texts: tuple[str, ...] = ()
    if _shows_text(request, command.commanded.task, manifest, engine):
        texts = texts_to_show(told.text)
        both = tuple(dict.fromkeys((*keep, *texts)))
        try:
            _check_keep(both, bans_of(ban), stop)
            _check_room(Keeps(both, codec.encode, texts), both, words, budget)
            keep = both
        except BadSetting as error:
            warnings += (f"the text to show may not be in the answer: {error.problem}",)
    elif manifest.prompt.schema and not reads_as_english(told.text):
        warnings += ("the request does not read as English, the language that training saw",)
    beginnings: tuple[str, ...] = ()
    if _restates(request, command.commanded.task, manifest, engine):
        beginnings = _fitting(told.text, words, ban, stop, budget, codec)
    limited = request.known_words and lexicon and engine.constrains and not choices
    own = (request.request, told.text, *keep)
    return Plan(
        request=request.request,
        asked=command.asked,
        commanded=command.commanded,
        warnings=warnings,
        prompt=tuple(prompt),
        budget=budget,
        limit=limit,
        words=words,
        stop=stop,
        sampling=sampling,
        # Keys and values that an adapter has computed are of no use to another.
        cache_key=f"{adapter.digest}\0{request.cache_key}" if adapter else request.cache_key,
        syntax=told if (told.slots or told.tail) and not choices else None,
        ban=ban,
        logprobs=logprobs,
        keep=keep,
        choices=choices,
        deadline_ms=request.deadline_ms,
        no_repeat_words=request.no_repeat_words,
        texts=texts,
        known=KnownWords(lexicon, codec, own) if limited else None,
        adapter=adapter,
        beginnings=beginnings,
        levels=levels,
    )


def _check_settings(request: Request) -> None:
    """Those that need neither the model nor another setting. Raises BadSetting."""
    for name in ("keep_length", "logprobs", "no_repeat_words", "known_words", "restate"):
        if not isinstance(value := getattr(request, name), bool):
            raise BadSetting(f"{name} is {shown(value)}", "allowed: True or False")
    if not is_count(request.best_of) or not 1 <= request.best_of <= MOST:
        raise BadSetting(f"best_of is {shown(request.best_of)}", f"allowed: 1 … {MOST}, whole")
    deadline = request.deadline_ms
    if not isinstance(request.cache_key, str) or "\0" in request.cache_key:
        raise BadSetting(f"cache_key is {shown(request.cache_key)}", "allowed: a text without NUL")
    if deadline is not None and not (
        isinstance(deadline, int | float)
        and not isinstance(deadline, bool)
        and 0 < deadline <= _DEADLINE_MAX
    ):
        raise BadSetting(f"deadline_ms is {shown(deadline)}", "allowed: above 0, up to 1e9")
    if request.syntax not in ("keep", "none"):
        raise BadSetting(f"syntax is {shown(request.syntax)}", "allowed: keep, none")


def _adapter(
    request: Request, task: str | None, adapters: Mapping[str, Adapter], engine: Engine
) -> Adapter | None:
    """Raises BadSetting, NotSupportedByEngine."""
    name = request.adapter
    if name is None:
        chosen = [one for one in adapters.values() if one.task and one.task == task][-1:]
    elif name == "":
        return None
    elif isinstance(name, str) and name in adapters:
        chosen = [adapters[name]]
    else:
        raise BadSetting(
            f"adapter is {shown(name)}", f"loaded: {', '.join(adapters) or 'none'}; '' is none"
        )
    if chosen and not engine.adapts:
        raise NotSupportedByEngine(
            f"{engine.name} cannot answer with adapter {chosen[0].name}",
            "load engine numba, or ask with adapter ''",
        )
    return chosen[0] if chosen else None


def _wording(request: Request) -> tuple[tuple[str, ...], ...]:
    """stop, ban, keep and choices of a request, checked. Raises BadSetting."""
    stop = _texts("stop", request.stop, _STOPS_MAX)
    ban = _texts("ban", request.ban, _BANS_MAX)
    try:
        bans = bans_of(ban)
    except ValueError as error:
        raise BadSetting(f"ban has {shown(error.args[0])}", "give words or phrases") from None
    keep = tuple(dict.fromkeys(_texts("keep", request.keep, _KEEPS_MAX)))
    if keep:
        _check_keep(keep, bans, stop)
    choices = tuple(dict.fromkeys(_texts("choices", request.choices, _CHOICES_MAX)))
    if choices:
        _check_choices(choices, {"ban": ban, "keep": keep, "stop": stop})
    return stop, ban, keep, choices


def _check_choices(choices: tuple[str, ...], others: Mapping[str, tuple[str, ...]]) -> None:
    if blank := [text for text in choices if text != text.strip() or not text]:
        raise BadSetting(f"choices has {shown(blank[0])}", "give texts without spaces around them")
    if given := [name for name, texts in others.items() if texts]:
        raise BadSetting(f"{given[0]} has no meaning with choices", "leave one out")


def _shows_text(request: Request, task: str | None, manifest: Manifest, engine: Engine) -> bool:
    """Whether the request is a text to show, and not for the model by itself."""
    schema = manifest.prompt.schema
    alone = not request.keep_length or request.choices or not engine.constrains
    return schema is not None and task in schema.verbatim and not alone


def _restates(request: Request, task: str | None, manifest: Manifest, engine: Engine) -> bool:
    schema = manifest.prompt.schema
    alone = not request.restate or request.choices or not engine.constrains
    return schema is not None and task in schema.restated and not alone


def _fitting(
    text: str,
    words: int | None,
    ban: tuple[str, ...],
    stop: tuple[str, ...],
    budget: int,
    codec: TextCodec,
) -> tuple[str, ...]:
    """What the answer may begin with: nothing that is banned, ends it, or fills it."""
    bans = bans_of(ban)
    fitting = [
        one
        for one in beginnings(text, words)
        if bans.closed(f"{one} ", 0) is None and not any(end in f"{one} " for end in stop)
    ]
    if not fitting or Choices(fitting, codec.encode).longest + _LEAST_ROOM > budget:
        return ()
    return tuple(fitting)


def _levels(manifest: Manifest, codec: TextCodec) -> tuple[int, ...]:
    """The tokens of the levels, where the model judges its answers."""
    schema = manifest.prompt.schema
    if schema is None or not schema.confidence:
        return ()
    return tuple(codec.control(token) for token in schema.axis("relevance").tokens()[1:])


def _check_room(keeps: Keeps, keep: tuple[str, ...], words: int | None, budget: int) -> None:
    if words is not None and keeps.words(keep) > (most := tolerance(words)[1]):
        raise BadSetting(
            f"keep has {keeps.words(keep)} words, more than the {most} of words {words}",
            "ask for more words, or keep fewer",
        )
    if keeps.tokens(keep) > budget:
        raise BadSetting(
            f"keep takes {keeps.tokens(keep)} tokens, more than the {budget} of the answer",
            "keep fewer words, or allow more tokens",
        )


def _budget(
    prompt: int, positions: int, asked: int | None, words: int | None
) -> tuple[int, Literal["max_tokens", "context"]]:
    """Tokens that may be generated, and the finish reason when they are used up."""
    room = positions - prompt
    if asked is None:
        need = _LEAST_ROOM if words is None else answer_tokens(words)
        what = f"about {need} for the answer"
    elif is_count(asked) and asked >= 1:
        need, what = asked, f"max_new_tokens {shown(asked)}"
    else:
        raise BadSetting(f"max_new_tokens is {shown(asked)}", "allowed: 1 or more, whole")
    if need > room:
        raise RequestTooLong(
            f"the prompt has {prompt} tokens; with {what} "
            f"that is more than the model's {positions} positions",
            "shorten the request, or ask for fewer words or tokens",
        )
    return (room, "context") if asked is None else (asked, "max_tokens")


def _texts(name: str, value: tuple[str, ...] | list[str] | str, most: int) -> tuple[str, ...]:
    """A setting that is a text or several. Raises BadSetting."""
    texts = (value,) if isinstance(value, str) else value
    if (
        isinstance(texts, tuple | list)
        and len(texts) <= most
        and all(isinstance(text, str) and 1 <= len(text) <= _LONGEST_TEXT for text in texts)
    ):
        return tuple(texts)
    raise BadSetting(
        f"{name} is {shown(value)}",
        f"allowed: up to {most} texts of 1 … {_LONGEST_TEXT} characters",
    )


def _check_keep(keep: tuple[str, ...], bans: Bans, stop: tuple[str, ...]) -> None:
    """Raises BadSetting for phrases that cannot be kept."""
    for phrase in keep:
        if phrase != phrase.strip() or not units(phrase):
            raise BadSetting(f"keep has {shown(phrase)}", "give words without spaces around them")
        if bans.closed(f"{phrase} ", 0) is not None:
            raise BadSetting(f"keep has {shown(phrase)}, which ban forbids", "leave one out")
        if any(one in f" {phrase}" for one in stop):
            raise BadSetting(f"keep has {shown(phrase)}, which a stop ends", "leave one out")


def _needless(sampling: Sampling) -> Iterator[str]:
    """Warnings of settings that have no effect together."""
    if sampling.greedy and sampling.seed is not None:
        yield "the seed has no effect: at temperature 0 the likeliest token is taken"


def answer_tokens(words: int) -> int:
    """About as many as the longest answer of `words` takes."""
    return round(tolerance(words)[1] * _TOKENS_PER_WORD)
