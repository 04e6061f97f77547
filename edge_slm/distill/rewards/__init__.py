"""Rewards: what a response is worth as an answer to its request."""

from edge_slm.distill.rewards.relevance import WIDTH, Array, Progress, Relevance, encoder_path

__all__ = ["WIDTH", "Array", "Progress", "Relevance", "encoder_path"]
