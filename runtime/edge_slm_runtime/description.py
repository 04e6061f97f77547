"""What a bundle's model is and can be asked, in words."""

from __future__ import annotations

from pathlib import Path

from edge_slm_runtime.bundle import Manifest
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.prompt import PromptForm


def model_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """(name, value) of the model and of its prompts."""
    model = manifest.model
    return [
        ("name", manifest.name),
        ("model", f"{model.architecture}, {model.layers} layers × {model.width}"),
        ("parameters", f"{manifest.parameters / 1e6:.1f} M"),
        ("vocabulary", f"{model.vocab_size} tokens"),
        ("context", f"{model.positions} tokens"),
        *_prompt_facts(manifest.prompt),
        *_adapters(manifest),
    ]


def _adapters(manifest: Manifest) -> list[tuple[str, str]]:
    names = [Path(path).stem for path in manifest.deltas]
    return [("adapters", ", ".join(names))] if names else []


def _prompt_facts(form: PromptForm) -> list[tuple[str, str]]:
    if not form.schema:
        sides = (("before", form.before), ("after", form.after))
        return [
            ("prompt", form.kind),
            *((name, repr(text)) for name, text in sides),
            ("ends with", " or ".join(form.ends)),
        ]
    levels = form.schema.axis("relevance").values
    return [
        ("tasks", ", ".join(form.schema.tasks)),
        ("words", _lengths(form.schema)),
        ("relevance", f"{levels[0]} … {levels[-1]}"),
    ]


def _lengths(schema: CommandSchema) -> str:
    lengths = task_lengths(schema)
    if len(set(lengths.values())) == 1:
        low, high = next(iter(lengths.values()))
        return f"{low} … {high}"
    return ", ".join(f"{task} {low} … {high}" for task, (low, high) in lengths.items())


def task_lengths(schema: CommandSchema) -> dict[str, tuple[int, int]]:
    """Of each task the fewest and the most words that training saw, where that is known;
    otherwise those of the grammar."""
    axis = schema.axis("words")
    seen = {task: schema.supported(axis, task) or axis.values for task in schema.tasks}
    return {
        task: (axis.bounds(values[0])[0], axis.bounds(values[-1])[1])
        for task, values in seen.items()
    }
