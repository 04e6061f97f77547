"""Options that several subcommands have."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from math import inf, isfinite
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

import edge_slm
from edge_slm_runtime.bundle import read_manifest
from edge_slm_runtime.engines import ENGINES
from edge_slm_runtime.errors import EdgeSlmError
from edge_slm_runtime.installed import find_bundle
from edge_slm_runtime.ranking import MOST
from edge_slm_runtime.sampling import NO_REPEAT_NGRAM_SIZE

F = TypeVar("F", bound=Callable[..., Any])

folder = click.Path(path_type=Path)  # its reader reports what is wrong with it


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, listed in the order given."""
    return lambda function: reduce(lambda f, option: option(f), reversed(options), function)


def default_bundle() -> Path:
    """The installed model that obeys commands, where there is exactly one; else the shipped one,
    which is small and has few good answers."""
    able = []
    for path in edge_slm.installed_models().values():
        with suppress(EdgeSlmError):  # loading it by its name says what is wrong with it
            able += [path] if read_manifest(path).prompt.schema else []
    return able[0] if len(able) == 1 else edge_slm.shipped_bundle()


def _tasks(context: click.Context, option: click.Parameter, begun: str) -> list[str]:
    """For the shell's completion: the tasks of the bundle that the command line names."""
    try:
        manifest = read_manifest(context.params.get("bundle") or default_bundle())
    except EdgeSlmError:
        return []
    tasks = manifest.prompt.schema.tasks if manifest.prompt.schema else ()
    return [task for task in tasks if task.startswith(begun)]


class Bundle(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """The folder of a bundle that is given by its path or by the name of an installed model."""

    name = "bundle"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        return find_bundle(value)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        models = [name for name in edge_slm.installed_models() if name.startswith(incomplete)]
        # bash forgets what comes before "dir".
        return [CompletionItem(incomplete, type="dir"), *map(CompletionItem, models)]


bundle_type = Bundle()
bundle_argument = click.argument("bundle", type=bundle_type, default=edge_slm.shipped_bundle)

threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads.  [default: what profile found quickest, else the cores it may use]",
)

engine_options = _together(
    click.option(
        "--engine",
        type=click.Choice(["auto", *ENGINES]),
        default="auto",
        show_default=True,
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "int8", "int4", "fp32"]),
        default="auto",
        show_default=True,
    ),
    threads_option,
)

model_options = _together(
    click.option(
        "--bundle",
        type=bundle_type,
        metavar="BUNDLE",
        default=default_bundle,
        help="Bundle folder, or name of an installed model.  [default: the installed model, if "
        "there is one; else the small one of the package]",
    ),
    engine_options,
)

command_options = _together(
    click.option(
        "--task", shell_complete=_tasks, help="What the prompt is for, one of the bundle's tasks."
    ),
    click.option("--words", type=int, help="Length to keep, ±10% or ±2 words."),
    click.option("--relevance", type=int, help="Level asked for, 0 (low) … 9 (high)."),
)

n_option = click.option(
    "--n",
    type=click.IntRange(1, MOST),
    default=1,
    show_default=True,
    help="Answers with distinct texts, the best first; drawn at --temperature, or at 0.8.",
)

# Their names are those of the keyword arguments of `SLM.generate`.
sampling_options = _together(
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        help="0 takes the likeliest token.",
    ),
    click.option(
        "--top-k", type=int, default=0, show_default=True, help="Keep the k likeliest; 0 keeps all."
    ),
    click.option(
        "--top-p", type=float, default=1.0, show_default=True, help="Keep this probability mass."
    ),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
    click.option(
        "--no-repeat-ngram-size",
        type=int,
        default=NO_REPEAT_NGRAM_SIZE,
        show_default=True,
        help="No run of this many tokens comes twice; 0 allows it.",
    ),
    click.option(
        "--known-words/--any-words",
        default=True,
        show_default=True,
        help="Only words of the request and of the bundle's lexicon, where it has one.",
    ),
    click.option(
        "--restate/--no-restate",
        default=True,
        show_default=True,
        help="Begin with the request, for tasks of which the bundle says so.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT; repeatable."),
    click.option(
        "--ban",
        multiple=True,
        metavar="TEXT",
        help="A word or phrase that the answer must not have, whatever its case; repeatable.",
    ),
    click.option(
        "--keep",
        multiple=True,
        metavar="TEXT",
        help="A word or phrase that the answer must have as it is; repeatable.",
    ),
    click.option(
        "--choice",
        "choices",
        multiple=True,
        metavar="TEXT",
        help="The answer is one of these texts, the one that the model likes; repeatable.",
    ),
    click.option("--max-new-tokens", type=int, help="Upper bound, in tokens."),
    click.option(
        "--keep-length/--no-keep-length",
        default=True,
        show_default=True,
        help="Keep the promise of --words, or let the model decide.",
    ),
    click.option(
        "--syntax",
        type=click.Choice(["keep", "none"]),
        default="keep",
        show_default=True,
        help="Put <lora:x:0.8>, (word:1.2), {a|b} and the like of the request back into the "
        "answer, or read them as text.",
    ),
    click.option(
        "--adapter",
        metavar="NAME",
        help="One of the bundle's adapters, or '' for none.  [default: that of the task]",
    ),
)


class Number(click.FloatRange):
    """A finite number of a range; click takes NaN to be in any."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number: float = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """Comma-separated numbers, each at least `least`."""

    name = "numbers"

    def __init__(self, kind: Callable[[str], float], least: float) -> None:
        self.kind, self.least = kind, least

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            numbers = [self.kind(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,2", param, ctx)
        if not all(self.least <= number < inf for number in numbers):  # NaN neither
            self.fail(f"{value!r}: at least {self.least:g}", param, ctx)
        return tuple(dict.fromkeys(numbers))


class Names(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """Comma-separated names."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        if not all(found):
            self.fail(f"{value!r} is not a list of names such as a,b", param, ctx)
        return found


counts = Numbers(int, 1)
names = Names()
