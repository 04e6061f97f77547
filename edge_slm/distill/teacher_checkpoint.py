"""A checkpoint that a student learns from token by token (knowledge distillation).

The student takes its tokenizer, its grammar's control tokens and, projected to its own width,
its embeddings. At every response token of the training data it then learns the teacher's
next-token distribution, of which `SoftLabels` keeps the k likeliest tokens. They are computed
once per record, under the record's whole command: what command dropout leaves of it is taught
the same distribution, as it is taught the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_slm.distill.model import fresh_model
from edge_slm.distill.objective import predictions, tensors
from edge_slm.distill.packing import Encoded, Packer
from edge_slm.distill.precision import use_bf16
from edge_slm.distill.prepare import bare_schema
from edge_slm.distill.recipe import DistillationRecipe, Recipe
from edge_slm.distill.soft_labels import SoftLabels
from edge_slm.distill.trainer import translate_out_of_memory
from edge_slm.progress import StageProgress, silent
from edge_slm_converters.checkpoint import read_checkpoint
from edge_slm_runtime.command import CommandSchema
from edge_slm_runtime.decoder import Decoder
from edge_slm_runtime.errors import DataError
from edge_slm_runtime.files import locked_folder

_SHARD = 2048  # records that are computed before any is written


@dataclass(frozen=True, slots=True)
class TeacherCheckpoint:
    """What a student needs of a teacher.

    digest: of its files. embedding: [vocabulary, width]. cache: folder for soft labels.
    """

    folder: Path
    digest: str
    decoder: Decoder
    embedding: torch.Tensor
    tokenizer: Any
    cache: Path

    @classmethod
    def read(cls, folder: str | Path, recipe: Recipe, cache: Path) -> TeacherCheckpoint:
        """Raises CheckpointError, and DataError when the teacher cannot teach this recipe."""
        from tokenizers import Tokenizer

        folder = Path(folder)
        checkpoint = read_checkpoint(folder)
        grammar, decoder = checkpoint.form.schema, checkpoint.decoder
        if grammar is None:
            raise _unfit(folder, "it obeys no commands")
        wanted = _settings(bare_schema(recipe))
        for name, value in _settings(grammar).items():
            if value != wanted[name]:
                raise _unfit(folder, f"its {name} is {value}, the recipe's {wanted[name]}")
        control = grammar.special_tokens()
        if list(checkpoint.tokens[: len(control)]) != control:
            raise _unfit(folder, "its control tokens are not the first of its vocabulary")
        if decoder.positions < recipe.model.positions:
            raise _unfit(
                folder,
                f"it has {decoder.positions} positions, the recipe {recipe.model.positions}",
            )
        if decoder.vocab_size < recipe.distillation.top_k:
            raise _unfit(folder, f"distillation.top_k is over its {decoder.vocab_size} tokens")
        digests = json.dumps(checkpoint.digests(), sort_keys=True)
        return cls(
            folder,
            hashlib.sha256(digests.encode()).hexdigest(),
            decoder,
            torch.from_numpy(np.array(checkpoint.tensors["embedding"])),
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            cache / "soft-labels",
        )

    def check_vocabulary(self, tokenizer: Any, of: str) -> None:
        """Raises DataError when `tokenizer`, that `of` a student, has other tokens."""
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise _unfit(self.folder, f"{of} has another vocabulary")

    def student(self, recipe: Recipe) -> Any:
        """A fresh model of the recipe's shape, with the teacher's vocabulary and embeddings."""
        shape = recipe.model.model_copy(update={"vocab_size": self.decoder.vocab_size})
        model = fresh_model(shape, recipe.seed)
        rows = projected(self.embedding, shape.width, recipe.seed)
        rows *= model.config.initializer_range
        model.get_input_embeddings().weight.data.copy_(rows)
        return model

    def soft_labels(
        self,
        recipe: Recipe,
        records: Sequence[Encoded],
        schema: CommandSchema,
        device: Any,
        report: StageProgress = silent,
    ) -> SoftLabels:
        """Of all records; those that the cache has are not computed again.

        Raises DataError (a damaged cache, or one that another process writes), OutOfMemory.
        """
        settings = recipe.distillation
        name = f"{self.digest}/{settings.top_k}/{settings.temperature}"
        folder = self.cache / hashlib.sha256(name.encode()).hexdigest()[:16]
        labels = SoftLabels(folder, settings.top_k, self.decoder.vocab_size)
        # Each once, so that a continued run packs what is left as an undisturbed one did.
        tokens = {tuple(e.prompt(schema) + e.response): e for e in records}
        missing = [e for whole, e in tokens.items() if whole not in labels]
        if missing:
            with locked_folder(folder), translate_out_of_memory(recipe):
                lm = self._model(device)
                for start in range(0, len(missing), _SHARD):
                    part = missing[start : start + _SHARD]

                    def note(done: int, start: int = start) -> None:
                        report("soft labels", start + done, len(missing), "")

                    labels.add(*_computed(lm, recipe, part, schema, device, note))
        return labels

    def _model(self, device: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return (
            AutoModelForCausalLM.from_pretrained(
                self.folder, attn_implementation="sdpa", dtype=torch.float32
            )
            .eval()
            .to(device)
        )


def projected(embedding: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """[tokens, width] of [tokens, any width]: principal components, turned at random, with a
    root mean square of 1.

    Of all projections to this width it keeps the differences of the rows best, and exactly (but
    for one factor) when they have so few dimensions; the mean, which it takes away, would add
    the same to all logits. The rotation changes no difference either; it gives every channel
    the same share, where components fall off by orders of magnitude.
    """
    centred = (embedding - embedding.mean(0)).double()
    _, directions = torch.linalg.eigh(centred.T @ centred)  # in rising order
    kept = directions[:, -width:]
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=generator).double())
    rows = centred @ kept @ turn[: kept.shape[1]]
    return (rows / rows.square().mean().sqrt()).float()


@torch.no_grad()  # type: ignore[untyped-decorator]
def _computed(
    lm: Any,
    recipe: Recipe,
    records: Sequence[Encoded],
    schema: CommandSchema,
    device: Any,
    note: Callable[[int], None],
) -> tuple[list[list[int]], list[Any], list[Any]]:
    """Arguments of `SoftLabels.add`, in the order in which the records are packed."""
    t, settings = recipe.train, recipe.distillation
    length = recipe.model.positions
    rows = max(1, (t.micro_tokens or t.batch_tokens) // length)
    packer = Packer(records, schema, rows=rows, length=length, dropout=0.0, seed=recipe.seed)
    body = torch.compile(lm.base_model) if t.compile else lm.base_model
    done: list[Encoded] = []
    ids: list[Any] = []
    log_p: list[Any] = []
    for number, plan in enumerate(packer.epoch(0, partial=True)):
        packed = [records[index] for row in plan for index in row]
        batch = tensors(packer.batch(0, number, plan), device)
        bf16 = use_bf16(t.precision)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            *_, logits = predictions(lm, body, batch)
        ends = np.cumsum([len(record.response) for record in packed])[:-1]
        top = _top(logits, settings)
        ids += np.split(top[0].cpu().numpy(), ends)
        log_p += np.split(top[1].cpu().numpy(), ends)
        done += packed
        note(len(done))
    return [e.prompt(schema) + e.response for e in done], ids, log_p


def _top(logits: torch.Tensor, settings: DistillationRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log probabilities) of the likeliest tokens, both [labels, k]."""
    logits = logits / settings.temperature
    values, ids = logits.topk(settings.top_k)
    return ids, values - logits.logsumexp(-1, keepdim=True)


def _settings(schema: CommandSchema) -> dict[str, Any]:
    """What a prompt is written by, under the names of a recipe."""
    return {
        "data.tasks": list(schema.tasks),
        "words": list(schema.axis("words").values),
        "hindsight.levels": schema.levels,
        "hindsight.position": schema.position,
        "data.cases": dict(schema.cases),
        "data.spaced": schema.spaced,
    }


def _unfit(folder: Path, why: str) -> DataError:
    return DataError(f"{folder} cannot teach this recipe: {why}", "give another teacher checkpoint")
