"""edge_slm's runtime: a verified bundle in, commanded text out. No torch, no network."""

import os

# onnxruntime reports home by default (on Linux since 1.29). This must be said
# before its import, and whatever imports it here imports this package first.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["ORT_TELEMETRY_DISABLED"] = "1"

from edge_slm_runtime.bundle import read_manifest
from edge_slm_runtime.command import Command, CommandSchema
from edge_slm_runtime.errors import EdgeSlmError
from edge_slm_runtime.generate import SLM
from edge_slm_runtime.installed import installed_models
from edge_slm_runtime.integrity import verify
from edge_slm_runtime.length import tolerance
from edge_slm_runtime.loading import load
from edge_slm_runtime.prompt import PromptForm
from edge_slm_runtime.records import Generation, Request, Stats
from edge_slm_runtime.session import Session, SessionStream
from edge_slm_runtime.stream import Stream

__all__ = [
    "SLM",
    "Command",
    "CommandSchema",
    "EdgeSlmError",
    "Generation",
    "PromptForm",
    "Request",
    "Session",
    "SessionStream",
    "Stats",
    "Stream",
    "installed_models",
    "load",
    "read_manifest",
    "tolerance",
    "verify",
]
