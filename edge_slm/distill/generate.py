"""Answers of a checkpoint in batches, for exploration rounds.

In torch, drawing tokens as the runtime's sampler does: temperature, one uniform number per
token from the generator of the row, inverse of the cumulative sum. So a seed gives the same
text as in the runtime, and the text of a row does not depend on its batch, both up to ties
in floating point (of which bf16 has more).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_slm.progress import Progress
from edge_slm_converters.sums import check_sums
from edge_slm_converters.text_side import read_schema
from edge_slm_runtime.command import Command
from edge_slm_runtime.errors import (
    CheckpointError,
    DependencyMissing,
    ManifestInvalid,
    RequestTooLong,
)
from edge_slm_runtime.prompt import PromptForm
from edge_slm_runtime.text import TextCodec

_CROWDED = 0.85  # share of a batch's rows that go on; below it, the others are dropped


@dataclass(frozen=True, slots=True)
class Episode:
    """A commanded request; with checkpoint and temperature it decides the text."""

    request: str
    command: Command
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The text of an episode; `ended` is False if the context was full before `<|end|>`."""

    text: str
    ended: bool


class Generator(Protocol):
    """Generates the outcomes of episodes, in their order."""

    def __call__(
        self,
        episodes: Sequence[Episode],
        *,
        temperature: float = 1.0,
        progress: Progress | None = None,
    ) -> list[Outcome]: ...


class EpisodeGenerator:
    """Generates the answers of the checkpoint folder `checkpoint`.

    device: None takes a GPU if there is one. batch: rows at once; None takes 64, or 512 on a
    GPU. bf16: None takes it on a GPU. Raises CheckpointError, DependencyMissing.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        batch: int | None = None,
        bf16: bool | None = None,
    ) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM

            from edge_slm.distill.kv_cache import GROUPED
        except ImportError:
            raise DependencyMissing(
                "sampling needs torch and transformers", "pip install 'edge-slm[train]'"
            ) from None
        folder = Path(checkpoint)
        check_sums(folder)
        self.schema = read_schema(folder)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_cpu = torch.device(self.device).type == "cpu"
        self.batch = batch or (64 if on_cpu else 512)
        dtype = torch.bfloat16 if (not on_cpu if bf16 is None else bf16) else torch.float32
        try:
            self.codec = TextCodec(folder / "tokenizer.json", PromptForm.commanded(self.schema))
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation=GROUPED
            )
        except (OSError, ValueError, ManifestInvalid) as error:
            raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}") from None
        self._model = model.to(self.device).eval()
        self._positions: int = model.config.max_position_embeddings

    def __call__(
        self,
        episodes: Sequence[Episode],
        *,
        temperature: float = 1.0,
        progress: Progress | None = None,
    ) -> list[Outcome]:
        """One answer per episode, in order. temperature 0 is greedy.

        Raises a RequestError for a request or command that the model cannot take.
        """
        prompts = [self._prompt(episode) for episode in episodes]

        # Rows of similar length share a batch; the longest come first, so that a lack of
        # memory shows at once.
        def size(i: int) -> tuple[int, int]:
            return episodes[i].command.words or 0, len(prompts[i])

        order = sorted(range(len(episodes)), key=size, reverse=True)
        answers: dict[int, Outcome] = {}
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            written = self._write(
                [prompts[i] for i in rows], [episodes[i].seed for i in rows], temperature
            )
            answers.update(zip(rows, written, strict=True))
            if progress:
                progress(len(answers), len(order))
        return [answers[i] for i in range(len(episodes))]

    def _prompt(self, episode: Episode) -> list[int]:
        prompt = self.codec.prompt(episode.request, episode.command)
        if len(prompt) >= self._positions:
            raise RequestTooLong(
                f"the prompt of {episode.request[:40]!r}… has {len(prompt)} tokens, "
                f"the model {self._positions} positions",
                "shorten the request",
            )
        return prompt

    def _write(
        self, prompts: list[list[int]], seeds: list[int], temperature: float
    ) -> list[Outcome]:
        """The answers of one batch; rows that have ended are dropped, several at a time."""
        import torch

        from edge_slm.distill.kv_cache import growing_cache

        longest = max(map(len, prompts))
        rows = torch.arange(len(prompts), device=self.device)
        room = self._positions - torch.tensor([len(p) for p in prompts], device=self.device)
        steps = int(room.max())
        # Left padding: the last token of every prompt is in the last column.
        (end,) = self.codec.ends
        padded = [[end] * (longest - len(prompt)) + prompt for prompt in prompts]
        ids = torch.tensor(padded, device=self.device)
        mask = (
            torch.arange(longest, device=self.device) >= longest - (self._positions - room)[:, None]
        )
        at = (mask.cumsum(1) - 1).clamp(min=0)
        # Padding attends to itself; to attend to nothing would give not-a-number.
        itself = torch.eye(longest, dtype=torch.bool, device=self.device)
        causal = torch.ones_like(itself).tril()
        attention = (mask[:, None, None] & causal) | itself
        draws = torch.from_numpy(
            np.stack([np.random.Generator(np.random.PCG64(s)).random(steps) for s in seeds])
        ).to(self.device)
        written = torch.full((len(prompts), steps), end, device=self.device)
        cache = growing_cache()
        with torch.inference_mode():
            for step in range(steps):
                logits = self._model(
                    input_ids=ids,
                    attention_mask=attention,
                    position_ids=at,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                token = self._pick(logits.float(), draws[rows, step], temperature)
                written[rows, step] = token
                going = (written[rows, : step + 1] != end).all(1) & (step + 1 < room[rows])
                left = int(going.sum())
                if not left:
                    break
                ids, at = token[:, None], (at[:, -1:] + 1).clamp(max=self._positions - 1)
                mask = torch.nn.functional.pad(mask, (0, 1), value=True)
                if left <= _CROWDED * len(rows):  # which copies the cache
                    kept = going.nonzero().flatten()
                    rows, ids, at, mask = rows[kept], ids[kept], at[kept], mask[kept]
                    cache.batch_select_indices(kept)
                attention = mask[:, None, None]
        return [
            self._answer(ids[:n]) for ids, n in zip(written.tolist(), room.tolist(), strict=True)
        ]

    def _pick(self, logits: Any, draws: Any, temperature: float) -> Any:
        """The next token of each row, from `logits` [rows, V], which it changes.

        draws: [rows], uniform in 0 … 1.
        """
        import torch

        for ids in self.codec.never(logits.shape[1]):
            logits[:, ids] = -torch.inf
        if temperature == 0:
            return logits.argmax(1)
        steps = (logits / temperature).softmax(1).cumsum(1, dtype=torch.float64)
        return torch.searchsorted(steps, (draws * steps[:, -1])[:, None], right=True)[:, 0]

    def _answer(self, ids: list[int]) -> Outcome:
        (end,) = self.codec.ends
        ended = end in ids
        text = self.codec.decode(ids[: ids.index(end)] if ended else ids)
        return Outcome(text.strip(), ended)
