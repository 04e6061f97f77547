"""Adapters of single tasks on a frozen model (`[adapters]` of a recipe).

Low-rank changes of the matrices of every layer (Hu et al., LoRA, arXiv 2106.09685), each trained on
the records of its task alone: the first stage of ALTER (arXiv 2309.11042), with factors that can be
merged in the place of its bottleneck layers. [ours]
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.utils import parametrize

from edge_slm.distill.recipe import AdaptersRecipe
from edge_slm_converters.architectures import architecture_of
from edge_slm_converters.checkpoint import weight_files
from edge_slm_converters.deltas import factors_of
from edge_slm_runtime.bundle import file_entry
from edge_slm_runtime.deltas import Delta, base_digest


class LowRank(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """weight + scale · b·a, nothing at first. transposed: the weight is [inputs, outputs]."""

    def __init__(self, weight: torch.Tensor, rank: int, scale: float, transposed: bool) -> None:
        super().__init__()
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        self.a = torch.nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.b = torch.nn.Parameter(torch.zeros(outputs, rank))
        self.scale, self.transposed = scale, transposed

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        change = self.scale * (self.b @ self.a)
        return weight + (change.T if self.transposed else change)


class Adapted:
    """A checkpoint's model with a new adapter, the only thing in it that is trained.

    lm: the model. The values that the adapter begins with depend on `seed` alone.
    """

    def __init__(self, checkpoint: Path, recipe: AdaptersRecipe, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        self.lm = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.lm.requires_grad_(False)
        settings = self.lm.config.to_dict()
        architecture = architecture_of(settings)
        self.decoder = architecture.decoder(settings)
        layout = architecture.layout(self.decoder, settings)
        self.layers: dict[str, LowRank] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for matrix in self.decoder.matrices():
                place = layout[f"{matrix}.weight"]
                for name in place.names if matrix.rsplit(".", 1)[1] in recipe.targets else ():
                    layer = name.removesuffix(".weight")
                    module = self.lm.base_model.get_submodule(layer)
                    low = LowRank(module.weight, recipe.rank, recipe.scale, not place.outputs_first)
                    parametrize.register_parametrization(module, "weight", low)
                    self.layers[layer] = low
        self.base = base_digest({f.name: file_entry(f).sha256 for f in weight_files(checkpoint)})

    def delta(self, task: str) -> Delta:
        """The adapter as it is now, named like its task."""
        factors = {
            layer: tuple(part.detach().float().cpu().numpy() for part in (low.a, low.scale * low.b))
            for layer, low in self.layers.items()
        }
        return Delta(task, task, self.base, factors_of(self.decoder, factors))
