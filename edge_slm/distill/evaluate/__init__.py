"""Evaluation on held-out requests: obedience to commands, and quality of the texts."""

from edge_slm.distill.evaluate.grid import answers_at_top
from edge_slm.distill.evaluate.html import write_html
from edge_slm.distill.evaluate.others import answers_of
from edge_slm.distill.evaluate.reading import grades_table, read_grades, write_sheet
from edge_slm.distill.evaluate.run import evaluate
from edge_slm.distill.evaluate.tables import print_table, show

__all__ = [
    "answers_at_top",
    "answers_of",
    "evaluate",
    "grades_table",
    "print_table",
    "read_grades",
    "show",
    "write_html",
    "write_sheet",
]
