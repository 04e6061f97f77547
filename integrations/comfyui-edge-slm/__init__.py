"""A ComfyUI node: a short request becomes a prompt, written on this machine by edge_slm."""

from __future__ import annotations

from functools import cache
from typing import Any

import edge_slm
from edge_slm_runtime import read_manifest

SHIPPED = "shipped"
OPEN = "any"
BEST_OF = 8  # answers, of which the best one is taken


@cache
def _loaded(model: str) -> edge_slm.SLM:
    return edge_slm.load(None if model == SHIPPED else model)


@cache
def _tasks() -> list[str]:
    """Of all models; one that does not know a task says so when it is asked."""
    found = dict.fromkeys(_loaded(SHIPPED).schema.tasks)
    for bundle in edge_slm.installed_models().values():
        prompt = read_manifest(bundle).prompt
        if prompt.schema:
            found |= dict.fromkeys(prompt.grammar.tasks)
    return list(found)


class EdgeSlmPrompt:
    """Request → prompt. ComfyUI runs it again when an input has changed, the seed too."""

    CATEGORY = "text/edge_slm"
    FUNCTION = "write"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("prompt",)
    DESCRIPTION = "Writes a prompt for the request with a small language model on the CPU."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        request = {"multiline": True, "default": "a red fox in the snow"}
        seed = {"default": 0, "min": 0, "max": 2**53, "control_after_generate": True}
        return {
            "required": {
                "request": ("STRING", request),
                "model": ([*reversed(edge_slm.installed_models()), SHIPPED],),
                "task": ([*_tasks(), OPEN],),
                "words": ("INT", {"default": 40, "min": 0, "max": 200, "tooltip": "0: any"}),
                "temperature": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 2.0, "step": 0.05}),
                "seed": ("INT", seed),
            },
            "optional": {"best_of": ("INT", {"default": BEST_OF, "min": 1, "max": 64})},
        }

    @classmethod
    def IS_CHANGED(cls, temperature: float, seed: int, **_: Any) -> int:  # noqa: N802
        """Without a temperature the seed changes nothing."""
        return seed if temperature else 0

    def write(
        self,
        request: str,
        model: str,
        task: str,
        words: int,
        temperature: float,
        seed: int,
        best_of: int = BEST_OF,
    ) -> tuple[str]:
        """Raises EdgeSlmError, which ComfyUI shows at the node."""
        answer = _loaded(model).generate(
            request,
            task=None if task == OPEN else task,
            words=words or None,
            temperature=temperature,
            seed=seed if temperature else None,
            best_of=best_of,
        )
        return (answer.text,)


NODE_CLASS_MAPPINGS = {"EdgeSlmPrompt": EdgeSlmPrompt}
NODE_DISPLAY_NAME_MAPPINGS = {"EdgeSlmPrompt": "Edge SLM prompt"}
