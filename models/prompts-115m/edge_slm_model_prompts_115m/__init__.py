"""The language model prompts-115m as a bundle of edge-slm."""

from pathlib import Path

BUNDLE = Path(__file__).parent / "prompts-115m"
