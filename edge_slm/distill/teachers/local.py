"""A teacher in this process: a causal language model run by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edge_slm.distill.teachers.base import BATCH, Ask
from edge_slm.distill.teachers.few_shot import (
    IDEAS_PER_PROMPT,
    Messages,
    answer_messages,
    completion,
    idea_messages,
    ideas,
    length,
    max_tokens,
    usable,
)
from edge_slm.progress import Progress
from edge_slm_runtime.errors import DependencyMissing, TeacherError

_IDEA_TOKENS = 20 * IDEAS_PER_PROMPT
_IDEA_ROUNDS = 4


class LocalTeacher:
    """model: a folder or a hub name; bfloat16 on a GPU, float32 elsewhere.

    A model with a chat template is asked in that template, another one continues plain
    text. Raises DependencyMissing, and TeacherError where the model cannot be loaded.
    """

    def __init__(self, model: str, temperature: float) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise DependencyMissing(
                "a teacher in this process needs transformers", "pip install 'edge-slm[train]'"
            ) from None
        self.name = f"transformers:{Path(model).name}"
        self._temperature = temperature
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
            self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TeacherError(
                f"cannot load teacher {model}: {reason}", "give a model folder or a hub name"
            ) from None
        self._model.to(self._device).eval()
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def invent(self, task: str, count: int, seed: int) -> list[str]:
        requests: dict[str, str] = {}
        each = -(-count // IDEAS_PER_PROMPT)
        for start in range(seed, seed + _IDEA_ROUNDS * each, min(each, BATCH)):
            prompts = [idea_messages(task, start + i) for i in range(min(each, BATCH))]
            for text, _ in self._write(prompts, _IDEA_TOKENS, start):
                for idea in ideas(text):
                    requests.setdefault(idea.casefold(), idea)
            if len(requests) >= count:
                break
        return list(requests.values())[:count]

    def answer(
        self, asks: Sequence[Ask], candidates: int, progress: Progress | None = None
    ) -> Iterator[tuple[Ask, list[str]]]:
        for start in range(0, len(asks), BATCH):
            batch = asks[start : start + BATCH]
            lengths = [length(ask, i) for ask in batch for i in range(candidates)]
            owners = [ask for ask in batch for _ in range(candidates)]
            prompts = [answer_messages(a, n) for a, n in zip(owners, lengths, strict=True)]
            answers = self._write(prompts, max_tokens(max(lengths)), batch[0].seed)
            for i, ask in enumerate(batch):
                if progress is not None:
                    progress(start + i + 1, len(asks))
                yield ask, usable(answers[i * candidates : (i + 1) * candidates])

    def _write(self, prompts: Sequence[Messages], limit: int, seed: int) -> list[tuple[str, bool]]:
        """(answer, whether it reached `limit` tokens) of each prompt, in one batch."""
        import torch

        chat = self._tokenizer.chat_template is not None
        inputs = self._tokenizer(
            [self._rendered(p) if chat else completion(p) for p in prompts],
            return_tensors="pt",
            padding=True,
            add_special_tokens=not chat,  # a template writes its own
        ).to(self._device)
        room = getattr(self._model.config, "max_position_embeddings", None)
        longest = inputs["input_ids"].shape[1]
        if room is not None and longest + limit > room:
            raise TeacherError(
                f"a prompt of {longest} tokens and an answer of {limit} exceed the {room} "
                f"positions of {self.name}",
                "take a model with a longer context",
            )
        how: dict[str, Any] = {"do_sample": False}
        if self._temperature > 0:
            how = {"do_sample": True, "temperature": self._temperature, "top_k": 0, "top_p": 1.0}
        if not chat:
            how |= {"stop_strings": ["\n\n"], "tokenizer": self._tokenizer}
        torch.manual_seed(seed)
        with torch.inference_mode():
            rows = self._model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=limit,
                pad_token_id=self._tokenizer.pad_token_id,
                **how,
            )[:, longest:]
        ends = self._model.generation_config.eos_token_id
        stops = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=rows.device)
        ended = torch.isin(rows, stops).any(dim=1).tolist()
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        if not chat:
            ended = [end or "\n\n" in text for end, text in zip(ended, texts, strict=True)]
            texts = [text.partition("\n\n")[0] for text in texts]
        return [(text, not end) for text, end in zip(texts, ended, strict=True)]

    def _rendered(self, messages: Messages) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return str(
            self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )
