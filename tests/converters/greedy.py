"""The greedy answer of our own float32 graph: what every engine is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_slm_converters.checkpoint import Checkpoint
from edge_slm_converters.gate import onnx_logits
from edge_slm_converters.graph import write_graph


def greedy_ids(
    checkpoint: Checkpoint, folder: Path, prompt: Sequence[int], new_tokens: int
) -> tuple[int, ...]:
    """The argmax over the whole vocabulary, end-of-text and padding included."""
    folder.mkdir()
    write_graph(checkpoint, "fp32", folder)
    logits = onnx_logits(folder, checkpoint.decoder, "fp32")
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(logits(ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])
