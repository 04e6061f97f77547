"""Runners: our runtime and its peers under one protocol, imported only when they are used."""

from __future__ import annotations

import importlib

from edge_slm_bench.runners.base import Float32, Prompt, Runner, Spec, TimedAnswer

__all__ = ["Float32", "Prompt", "Runner", "Spec", "TimedAnswer", "open_runner"]


def open_runner(spec: Spec, threads: int) -> Runner:
    """Loads a model. Raises DependencyMissing, and what its engine raises."""
    module = importlib.import_module(f"edge_slm_bench.runners.{spec.runner}")
    runner: Runner = module.open(spec, threads)
    return runner
