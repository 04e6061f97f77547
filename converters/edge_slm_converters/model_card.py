"""The model card of a distribution: what the manifest of its bundle says, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge_slm_runtime.bundle import Manifest, Variant
from edge_slm_runtime.command import CommandSchema


def model_card(manifest: Manifest, license: str, card: str = "") -> str:  # noqa: A002
    """license: SPDX expression. card: Markdown that stands before the recipe."""
    model = manifest.model
    parts = [
        f"# {manifest.name}",
        (
            f"A language model for edge-slm: {model.architecture}, "
            f"{manifest.parameters / 1e6:.1f}M parameters ({model.layers} layers × "
            f"{model.width}), vocabulary {model.vocab_size}, context {model.positions} tokens."
        ),
        f"Licence: {license}. Digest of the bundle: `{manifest.digest}`.",
        _usage(manifest),
        *_commands(manifest.prompt.schema),
        *_variants(manifest),
        card.strip(),
        *_training(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(manifest: Manifest) -> str:
    schema = manifest.prompt.schema
    task = f', task="{schema.tasks[0]}"' if schema else ""
    return (
        "```python\n"
        "# pip install . (in this folder)\n"
        "import edge_slm\n\n"
        f'slm = edge_slm.load("{manifest.name}")\n'
        f'print(slm.generate("a red fox in the snow"{task}, words=24).text)\n'
        "```"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _commands(schema: CommandSchema | None) -> Iterator[str]:
    """What can be commanded, and what of it training saw."""
    if schema is None:
        return
    yield "## Commands"
    words = schema.axis("words")
    rows = []
    for task in schema.tasks:
        counts = schema.support.get(task, {}).get("words", {})
        seen = [v for v in words.values if counts.get(v, 0) >= schema.min_support]
        lengths = f"{words.bounds(seen[0])[0]} … {words.bounds(seen[-1])[1]}" if seen else "–"
        rows.append([task, lengths])
    yield _table(["task", "words that training saw"], rows)
    yield f"Levels of relevance: 0 … {schema.levels - 1}."


def _variants(manifest: Manifest) -> Iterator[str]:
    yield "## Variants"
    yield _table(
        [
            "variant",
            "engine",
            "size",
            "memory",
            "top-1 agreement with fp32",
            "mean KL",
            "perplexity ratio",
            "words within ±10% or ±2",
        ],
        [_row(variant) for variant in manifest.variants],
    )
    yield (
        "Measured when the bundle was made. Memory is the runtime's estimate, for prompts and "
        "answers as long as the context. Words are those of the model alone, without the length "
        "promise of the decoder."
    )
    gate = manifest.provenance.get("gate", {})
    if accepted := gate.get("accepted"):
        yield "Accepted outside the budget of the fidelity gate: " + "; ".join(accepted) + "."


def _row(variant: Variant) -> list[str]:
    fidelity, adherence = variant.fidelity or {}, variant.adherence or {}

    def figure(figures: Any, name: str, form: str) -> str:
        return format(figures[name], form) if name in figures else "–"

    memory = f"{variant.peak_rss_mb:.0f} MiB" if variant.peak_rss_mb is not None else "–"
    return [
        variant.name,
        variant.engine,
        f"{variant.bytes / 1e6:.1f} MB",
        memory,
        figure(fidelity, "top1", ".1%"),
        figure(fidelity, "kl_mean", ".4f"),
        figure(fidelity, "perplexity_ratio", ".4f"),
        figure(adherence, "within", ".1%"),
    ]


def _training(manifest: Manifest) -> Iterator[str]:
    """The recipe, what it did with the data, and how training went."""
    made = manifest.provenance.get("recipe")
    if not made:
        return
    yield "## Training"
    yield "The recipe, counts of the data, and figures at the end of each stage:"
    yield "```text\n" + "\n".join(_lines(made)) + "\n```"


def _lines(made: Mapping[str, Any]) -> Iterator[str]:
    """A line for each setting and fact."""
    for section in ("recipe", "data"):
        for name, value in made.get(section, {}).items():
            yield f"{section}.{name}: {json.dumps(value, ensure_ascii=False)}"
    for stage in made.get("history", ()):
        yield f"history: {json.dumps(stage, ensure_ascii=False)}"
