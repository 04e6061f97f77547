"""A teacher behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, …"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice

from edge_slm.distill.chat import Chat, ChatRequest
from edge_slm.distill.teachers.base import Ask
from edge_slm.distill.teachers.few_shot import (
    IDEAS_PER_PROMPT,
    answer_messages,
    idea_messages,
    ideas,
    length,
    max_tokens,
    usable,
)
from edge_slm.progress import Progress

_IDEA_TOKENS = 40 * IDEAS_PER_PROMPT


class ServerTeacher:
    """Asks for one candidate at a time, each with its own length and seed.

    The methods raise TeacherError when the server does not answer.
    """

    def __init__(self, chat: Chat, temperature: float) -> None:
        self.name = f"server:{chat.model}"
        self._chat = chat
        self._temperature = temperature

    def invent(self, task: str, count: int, seed: int) -> list[str]:
        # Models repeat their ideas: up to four times as many prompts as without repetition.
        most = 4 * -(-count // IDEAS_PER_PROMPT)
        prompts = (
            ChatRequest(idea_messages(task, s), self._temperature, _IDEA_TOKENS, s)
            for s in range(seed, seed + most)
        )
        requests: dict[str, str] = {}
        with closing(self._chat.ask(prompts)) as replies:
            for reply in replies:
                for idea in ideas(reply.text):
                    requests.setdefault(idea.casefold(), idea)
                if len(requests) >= count:
                    break
        return list(requests.values())[:count]

    def answer(
        self, asks: Sequence[Ask], candidates: int, progress: Progress | None = None
    ) -> Iterator[tuple[Ask, list[str]]]:
        prompts = (self._prompt(ask, i) for ask in asks for i in range(candidates))
        with closing(self._chat.ask(prompts)) as replies:
            for done, ask in enumerate(asks, 1):
                answers = [(reply.text, reply.cut) for reply in islice(replies, candidates)]
                if progress is not None:
                    progress(done, len(asks))
                yield ask, usable(answers)

    def _prompt(self, ask: Ask, candidate: int) -> ChatRequest:
        words = length(ask, candidate)
        messages = answer_messages(ask, words)
        return ChatRequest(messages, self._temperature, max_tokens(words), ask.seed + candidate)
