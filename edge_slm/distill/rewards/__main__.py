"""Mean rewards of samples and of spoilt copies of them, as a table with a row per task:

python -m edge_slm.distill.rewards SAMPLES... [--rows 100] [--cache FOLDER]
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from edge_slm.distill.rewards import Fluency, Keywords, Relevance, Reward
from edge_slm.distill.samples import Sample, read_samples
from edge_slm_runtime.errors import EdgeSlmError


def variants(samples: Sequence[Sample], seed: int = 0) -> Iterator[tuple[str, list[Sample]]]:
    """(name, samples): as they are, then spoilt in five ways."""
    rng = random.Random(seed)

    def of(responses: list[str]) -> list[Sample]:
        return [replace(s, response=r) for s, r in zip(samples, responses, strict=True)]

    words = [sample.response.split() for sample in samples]
    yield "as written", list(samples)
    yield "another's", of([sample.response for sample in [*samples[1:], samples[0]]])
    yield "echo", of([sample.request for sample in samples])
    yield "echo twice", of([f"{sample.request}, {sample.request}" for sample in samples])
    yield "loop", of([" ".join(w + w[-rng.randint(1, 6) :] * 6) for w in words])
    yield "cut", of([" ".join([*w[: 1 + len(w) // 2], "with", "the"]) for w in words])


@click.command()
@click.argument("data", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=100, show_default=True, help="Samples per task, drawn by chance.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for embeddings.")
def main(data: Sequence[Path], rows: int, cache: Path | None) -> None:
    """Mean rewards of SAMPLES (JSONL files or folders) and of spoilt copies of them."""
    by_task: dict[str, list[Sample]] = defaultdict(list)
    try:
        for sample in read_samples(data):
            if sample.request:
                by_task[sample.task].append(sample)
        rewards: list[Reward] = [Relevance(cache), Keywords(), Fluency()]
        click.echo(f"Each cell: {', '.join(reward.name for reward in rewards)}.\n")
        for i, (task, samples) in enumerate(by_task.items()):
            chosen = random.Random(0).sample(samples, min(rows, len(samples)))
            copies = dict(variants(chosen))
            if i == 0:
                click.echo(f"| task | rows | {' | '.join(copies)} |")
                click.echo("|---" * (len(copies) + 2) + "|")
            cells = [
                " ".join(f"{reward.score(variant).mean():.2f}" for reward in rewards)
                for variant in copies.values()
            ]
            click.echo(f"| {task} | {len(chosen)} | {' | '.join(cells)} |")
    except EdgeSlmError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
