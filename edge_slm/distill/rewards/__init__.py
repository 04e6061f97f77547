"""Rewards: what a response is worth as an answer to its request."""

from edge_slm.distill.rewards.base import Array, Progress, Reward
from edge_slm.distill.rewards.relevance import WIDTH, Relevance, encoder_path

__all__ = ["WIDTH", "Array", "Progress", "Relevance", "Reward", "encoder_path"]
