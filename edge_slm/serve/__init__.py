"""A server for one model: OpenAI's endpoints, a plain one of our own, and a page to try it."""

from edge_slm.serve.app import application
from edge_slm.serve.server import serve

__all__ = ["application", "serve"]
