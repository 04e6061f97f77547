"""Evaluation on held-out requests: obedience to commands, and quality of the texts."""

from edge_slm.distill.evaluate.html import write_html
from edge_slm.distill.evaluate.run import evaluate
from edge_slm.distill.evaluate.tables import show

__all__ = ["evaluate", "show", "write_html"]
