"""Turns a trained checkpoint into a bundle that a device can run."""

from edge_slm_bench.metrics.examples import Example
from edge_slm_converters.checkpoint import read_checkpoint
from edge_slm_converters.convert import convert
from edge_slm_converters.distribution import write_distribution
from edge_slm_converters.synthetic import random_checkpoint
from edge_slm_converters.variants import DEFAULT_VARIANTS, VARIANTS

__all__ = [
    "DEFAULT_VARIANTS",
    "VARIANTS",
    "Example",
    "convert",
    "random_checkpoint",
    "read_checkpoint",
    "write_distribution",
]
