"""`edge-slm evaluate`: obedience of a bundle to its commands, and quality of its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edge_slm
from edge_slm.cli.console import emit_json, json_option, reporter, stdout_console
from edge_slm.cli.options import model_options
from edge_slm_runtime.errors import DataError, TargetExists

if TYPE_CHECKING:
    from edge_slm.distill.samples import Sample
    from edge_slm.progress import StageProgress

_OTHERS = 3  # sets of answers to compare with


def _named(
    context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    pairs = [value.partition("=") for value in given]
    if bad := [name + sign + value for name, sign, value in pairs if not (name and value)]:
        raise click.BadParameter(f"{bad[0]!r} is not NAME=VALUE")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise click.BadParameter("a name comes twice")
    return {name: value for name, _, value in pairs}


@click.command(short_help="Measure obedience and quality on held-out requests.")
@model_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="The samples that the model was trained on; their held-out requests are used.",
)
@click.option("--task", "tasks", multiple=True, help="Repeatable.  [default: all of the model]")
@click.option("--requests", type=click.IntRange(min=2), default=200, show_default=True)
@click.option(
    "--answers",
    multiple=True,
    callback=_named,
    metavar="NAME=FILE",
    help="Another model's answers to compare with: JSONL as the samples, a bundle, or "
    "MODEL=http://… to ask an OpenAI-compatible server. Up to 3.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    callback=_named,
    metavar="NAME=BUNDLE",
    help="Another bundle, asked without a command; for example of plain supervised training.",
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
@json_option
def evaluate(
    *,
    bundle: Path | None,
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
    as_json: bool,
) -> None:
    """Command lengths, relevance levels and tasks on held-out requests; compare the answers
    with baselines, with the references and with other models.

    Needs the [train] extra, for the scorers.
    """
    if len(answers) > _OTHERS:
        raise click.BadParameter(f"at most {_OTHERS} times", param_hint="--answers")
    if html and html.exists():
        raise TargetExists(f"{html} exists", "give another --html")
    if html and not html.parent.is_dir():
        raise click.BadParameter(f"{html.parent} is no folder", param_hint="--html")

    from edge_slm.distill.evaluate import show, write_html

    result = measure(
        bundle,
        data,
        tasks=tasks,
        requests=requests,
        answers=answers,
        baselines=baselines,
        best_of=best_of,
        server=server,
        engine=engine,
        precision=precision,
        threads=threads,
    )
    if as_json:
        emit_json(result)
    else:
        show(result, stdout_console())
    if html:
        write_html(result, html)


def measure(
    bundle: Path | None,
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
    from edge_slm.distill.evaluate import evaluate as run
    from edge_slm.distill.recipe import RewardRecipe
    from edge_slm.distill.rewards import make_reward
    from edge_slm.distill.samples import divide, held_out_samples, read_samples
    from edge_slm.distill.split import Reading

    with ExitStack() as stack:
        slm = stack.enter_context(edge_slm.load(bundle, **settings))
        report = stack.enter_context(reporter())
        made_by = slm.manifest.provenance.get("recipe")
        if not made_by:
            raise DataError("the bundle does not say what was held out", "convert a trained model")
        recipe = made_by["recipe"]
        reading = Reading.of(recipe["data"])
        reward = RewardRecipe.model_validate(recipe.get("reward", {}))
        report("read", 0, 1, "")
        for task in tasks:
            slm.schema.axis("task").value_of(task)
        samples = held_out_samples(data, tasks or slm.schema.tasks, requests, reading)
        if len(samples) < 2:
            raise DataError(f"{len(samples)} held-out requests are too few", "give more data")
        pairs = [s for s in read_samples(data, reading=reading) if s.request]
        train, _ = divide(pairs, reading.holdout_percent)
        report("read", 1, 1, f"{len(samples)} held-out requests")
        return run(
            slm,
            samples,
            train_samples=train,
            answers={
                name: _answers(name, source, samples, report)
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


def _answers(
    name: str, source: str, samples: Sequence[Sample], report: StageProgress
) -> dict[str, str]:
    """Request → text, of a JSONL file, a bundle or the server at an address."""
    from edge_slm.distill.recipe import TeacherRecipe
    from edge_slm.distill.samples import read_jsonl
    from edge_slm.distill.teachers import Ask, make_teacher

    server = source if source.startswith(("http://", "https://")) else None
    if server or Path(source).is_dir() or source in edge_slm.installed_models():
        recipe = TeacherRecipe(
            kind="server" if server else "bundle",
            model=name if server else source,
            source="data",
            temperature=0,
        )
        teacher = make_teacher(recipe, server=server, journal=None)
        asks = [Ask(s.task, s.request, words=s.words) for s in samples]
        answered = teacher.answer(asks, 1, lambda i, n: report(f"ask {name}", i, n, ""))
        return {ask.request: texts[0] for ask, texts in answered if texts}
    wanted = {(s.task, s.request) for s in samples}
    texts_of = {
        folded: response
        for request, response, task in read_jsonl([source])
        if request and (task, folded := " ".join(request.split())) in wanted
    }
    if not texts_of:
        raise DataError(f"{source} answers none of the evaluated requests", "see --data")
    return texts_of
