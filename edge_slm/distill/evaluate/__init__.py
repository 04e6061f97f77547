"""Does the model obey, and is what it writes any good? Measured on held-out requests."""

from edge_slm.distill.evaluate.html import write_html
from edge_slm.distill.evaluate.run import evaluate
from edge_slm.distill.evaluate.tables import show

__all__ = ["evaluate", "show", "write_html"]
