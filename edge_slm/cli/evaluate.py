"""`edge-slm evaluate`: obedience of a bundle to its commands, and quality of its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edge_slm
from edge_slm.cli.console import emit_json, examples, json_option, reporter, stdout_console
from edge_slm.cli.options import model_options
from edge_slm_runtime.errors import BadSetting, DataError, TargetExists

if TYPE_CHECKING:
    from edge_slm.distill.samples import Sample
    from edge_slm.distill.split import Reading
    from edge_slm.progress import StageProgress
    from edge_slm_runtime import SLM

_OTHERS = 8  # sets of answers to compare with
_REFERENCES = "references"
_SHEET = Path("reading.html")


def _named(
    context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    pairs = [value.partition("=") for value in given]
    if bad := [name + sign + value for name, sign, value in pairs if not (name and value)]:
        raise click.BadParameter(f"{bad[0]!r} is not NAME=VALUE")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise click.BadParameter("a name comes twice")
    return {name: value for name, _, value in pairs}


@click.command(
    short_help="Measure obedience and quality on held-out requests.",
    epilog=examples(
        "evaluate --bundle runs/mine/bundle --data samples.jsonl --html evaluation.html",
        "evaluate --data samples.jsonl --task image --requests 50 --best-of 0 --json",
    ),
)
@model_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    help="The samples that the model was trained on; their held-out requests are used.  "
    "[required, but for --grades]",
)
@click.option("--task", "tasks", multiple=True, help="Repeatable.  [default: all of the model]")
@click.option("--requests", type=click.IntRange(min=2), default=200, show_default=True)
@click.option(
    "--answers",
    multiple=True,
    callback=_named,
    metavar="NAME=FILE",
    help="Another model's answers to compare with: JSONL as the samples, a bundle, a language "
    "model's GGUF file, or MODEL=http://… to ask an OpenAI-compatible server. Up to 8.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    callback=_named,
    metavar="NAME=BUNDLE",
    help="Another bundle, asked with the task alone; for example of plain supervised training.",
)
@click.option(
    "--best-of",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Candidates of the best-of-n baseline; 0 leaves it out.",
)
@click.option(
    "--server", envvar="OPENAI_BASE_URL", help="Server of the judge, if it was in the reward."
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots."
)
@click.option(
    "--read",
    type=click.IntRange(min=2),
    metavar="N",
    help="Measure nothing: write a page (--html, default reading.html) to grade N answers on, "
    "evenly over the tasks, of the bundle, the references and --answers, without their names, "
    "and beside it a key with them.",
)
@click.option(
    "--grades",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Measure nothing: print the usable shares of grades downloaded from such a page.",
)
@json_option
@click.pass_context
def evaluate(
    context: click.Context,
    /,
    *,
    bundle: Path,
    engine: str,
    precision: str,
    threads: int | None,
    data: tuple[Path, ...],
    tasks: tuple[str, ...],
    requests: int,
    answers: dict[str, str],
    baselines: dict[str, str],
    best_of: int,
    server: str | None,
    html: Path | None,
    read: int | None,
    grades: Path | None,
    as_json: bool,
) -> None:
    """Command lengths, relevance levels and tasks on held-out requests; compare the answers
    with baselines, with the references and with other models.

    Needs the [train] extra, for the scorers.
    """
    if grades:
        _print_grades(grades, as_json=as_json)
        return
    if not data:
        raise click.MissingParameter(ctx=context, param_hint="'--data'", param_type="option")
    if len(answers) > _OTHERS:
        raise click.BadParameter(f"at most {_OTHERS} times", param_hint="--answers")
    page = html or (_SHEET if read else None)
    if page and page.exists():
        raise TargetExists(f"{page} exists", "give another --html")
    if page and not page.parent.is_dir():
        raise click.BadParameter(f"{page.parent} is no folder", param_hint="--html")
    common: dict[str, Any] = {
        "tasks": tasks,
        "answers": answers,
        "engine": engine,
        "precision": precision,
        "threads": threads,
    }
    if read and page:
        sheet = _sheet(bundle, data, count=read, page=page, **common)
        if as_json:
            emit_json(sheet)
        else:
            click.echo(page)
        return

    from edge_slm.distill.evaluate import show, write_html

    result = measure(
        bundle,
        data,
        requests=requests,
        baselines=baselines,
        best_of=best_of,
        server=server,
        **common,
    )
    if as_json:
        emit_json(result)
    else:
        show(result, stdout_console())
    if html:
        write_html(result, html)


def _print_grades(grades: Path, *, as_json: bool) -> None:
    from edge_slm.distill.evaluate import grades_table, print_table, read_grades

    result = read_grades(grades)
    if as_json:
        emit_json(result)
    else:
        print_table(grades_table(result), stdout_console())


def measure(
    bundle: Path,
    data: Sequence[Path],
    *,
    tasks: Sequence[str] = (),
    requests: int = 200,
    answers: Mapping[str, str] | None = None,
    baselines: Mapping[str, str] | None = None,
    best_of: int = 4,
    server: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`edge_slm.distill.evaluate.evaluate` of a bundle, on what its recipe held out of `data`.

    settings: of `edge_slm.load`. Raises DataError when the bundle does not say what was
    held out, or there are too few held-out requests.
    """
    from edge_slm.distill.evaluate import answers_of
    from edge_slm.distill.evaluate import evaluate as run
    from edge_slm.distill.recipe import RewardRecipe
    from edge_slm.distill.rewards import make_reward
    from edge_slm.distill.samples import divide, read_samples

    with ExitStack() as stack:
        slm = stack.enter_context(edge_slm.load(bundle, **settings))
        report = stack.enter_context(reporter())
        recipe, reading = _made_by(slm)
        reward = RewardRecipe.model_validate(recipe.get("reward", {}))
        samples = _held_out(slm, data, tasks, requests, reading, report)
        pairs = [s for s in read_samples(data, reading=reading) if s.request]
        train, _ = divide(pairs, reading.holdout_percent)
        return run(
            slm,
            samples,
            train_samples=train,
            answers={
                name: answers_of(name, source, samples, report, settings.get("threads"))
                for name, source in (answers or {}).items()
            },
            baselines={
                name: stack.enter_context(edge_slm.load(path, **settings))
                for name, path in (baselines or {}).items()
            },
            best_of=best_of,
            reward=make_reward(reward, None, bf16=False, server=server),
            report=report,
        )


def _sheet(
    bundle: Path,
    data: Sequence[Path],
    *,
    tasks: Sequence[str],
    count: int,
    answers: Mapping[str, str],
    page: Path,
    **settings: Any,
) -> dict[str, Any]:
    """Writes a sheet of up to `count` answers: the bundle's, the references and `answers`."""
    from edge_slm.distill.evaluate import answers_at_top, answers_of, write_sheet

    with ExitStack() as stack:
        slm = stack.enter_context(edge_slm.load(bundle, **settings))
        report = stack.enter_context(reporter())
        own = slm.manifest.name
        if taken := {own, _REFERENCES} & set(answers):
            raise BadSetting(f"--answers {taken.pop()} is a name that the sheet has", "rename it")
        requests = count // (len(answers) + 2)
        if not requests:
            raise BadSetting(f"{count} answers are too few", "give --read more, or fewer --answers")
        _, reading = _made_by(slm)
        held = _held_out(slm, data, tasks, requests, reading, report)
        written = answers_at_top(slm, held, report)
        samples = list(written)
        return write_sheet(
            samples,
            {
                own: {sample.request: text for sample, text in written.items()},
                _REFERENCES: {sample.request: sample.response for sample in samples},
                **{
                    name: answers_of(name, source, samples, report, settings.get("threads"))
                    for name, source in answers.items()
                },
            },
            page,
        )


def _made_by(slm: SLM) -> tuple[dict[str, Any], Reading]:
    """The recipe of a bundle, and how it read its data."""
    from edge_slm.distill.split import Reading

    made_by = slm.manifest.provenance.get("recipe")
    if not made_by:
        raise DataError("the bundle does not say what was held out", "convert a trained model")
    return made_by["recipe"], Reading.of(made_by["recipe"]["data"])


def _held_out(
    slm: SLM,
    data: Sequence[Path],
    tasks: Sequence[str],
    requests: int,
    reading: Reading,
    report: StageProgress,
) -> list[Sample]:
    from edge_slm.distill.samples import held_out_samples

    report("read", 0, 1, "")
    for task in tasks:
        slm.schema.axis("task").value_of(task)
    samples = held_out_samples(data, tasks or slm.schema.tasks, requests, reading)
    if len(samples) < 2:
        raise DataError(f"{len(samples)} held-out requests are too few", "give more data")
    report("read", 1, 1, f"{len(samples)} held-out requests")
    return samples
