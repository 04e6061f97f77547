"""Rewards: scores of a response as an answer to its request.

relevance  cosine of their embeddings
keywords   share of the content words of the request that the response has
fluency    guards against repetition, truncation, echo and gibberish
judge      an LLM's score by a rubric
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_slm.distill.rewards.base import Float32, Reward
from edge_slm.distill.rewards.fluency import Fluency
from edge_slm.distill.rewards.keywords import Keywords
from edge_slm.distill.rewards.relevance import WIDTH, Relevance, encoder_path
from edge_slm.distill.rewards.weighted import Gated, Weighted
from edge_slm_runtime.errors import BadSetting

if TYPE_CHECKING:
    from edge_slm.distill.recipe import RewardRecipe

__all__ = [
    "WIDTH",
    "Float32",
    "Fluency",
    "Gated",
    "Keywords",
    "Relevance",
    "Reward",
    "Weighted",
    "encoder_path",
    "make_reward",
]


def make_reward(
    recipe: RewardRecipe, cache: Path | None, *, bf16: bool, server: str | None
) -> Reward:
    """The reward of a recipe: one part as it is, several as their weighted mean.

    cache: a folder for embeddings and the judge's scores. bf16: precision of the encoder.
    server: base address of the judge's OpenAI-compatible server; raises BadSetting when a
    judge needs it and it is missing.
    """
    parts: list[tuple[float, Reward]] = []
    if recipe.relevance:
        parts.append((recipe.relevance, Relevance(cache, bf16=bf16)))
    if recipe.keywords:
        parts.append((recipe.keywords, Keywords()))
    if recipe.fluency and not recipe.gated:
        parts.append((recipe.fluency, Fluency()))
    if recipe.judge:
        if not server or not recipe.judge_model:
            raise BadSetting(
                "reward.judge needs reward.judge_model and the server's address",
                "give something like http://127.0.0.1:8000/v1, or set reward.judge = 0",
            )
        # Imported here, because only a judge needs a client of servers.
        from edge_slm.distill.chat import Chat
        from edge_slm.distill.rewards.judge import LlmJudge

        parts.append((recipe.judge, LlmJudge(Chat(server, recipe.judge_model), cache)))
    if recipe.gated:
        return Gated(parts, Fluency())
    return parts[0][1] if len(parts) == 1 else Weighted(parts)
