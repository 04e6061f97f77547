"""Every error that edge_slm raises on purpose, one class per cause.

    EdgeSlmError                    exit 1
    ├── RequestError                exit 3   what the caller asked
    │   ├── EmptyRequest, RequestNotText, RequestTooLong, ControlTokenInRequest
    │   ├── UnknownTask, WordsOutOfRange, RelevanceOutOfRange, NoCommandGrammar
    │   └── BadSetting
    ├── BundleError                 exit 4   the model folder
    │   ├── BundleNotFound, ManifestInvalid, ManifestAltered, SchemaVersionUnsupported
    │   ├── FileMissing, FileTruncated, FileAltered, FileUnlisted, SymlinkRefused, PathEscape
    │   ├── Untrusted, DowngradeRefused, SelfTestFailed, DownloadFailed, StoreNotWritable
    │   └── AdapterInvalid
    ├── EngineError                 exit 5   what runs the model
    │   ├── EngineNotInstalled, VariantNotFound, NotSupportedByEngine
    │   └── UsedAfterFork, BoundToProcess
    ├── SessionFull                 exit 1   more requests at a time than may wait
    ├── DependencyMissing           exit 5   an extra that is not installed
    ├── CheckpointError             exit 6   what is converted (raised by the converters)
    ├── GateRefused                 exit 7   a variant outside its budget
    ├── DataError                   exit 8   training or batch data
    ├── TargetExists                exit 9   what would be overwritten
    ├── TeacherError                exit 10  a teacher or judge that does not answer
    ├── BenchRegression             exit 11  a benchmark that became worse
    ├── OutOfMemory                 exit 12  what does not fit into the memory
    └── BatchFailed                 exit 13  a batch whose lines failed

`code` is stable: programs may match on it. `str(error)` is one line: what is
wrong and where, then what to do about it.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AdapterInvalid",
    "BadSetting",
    "BatchFailed",
    "BenchRegression",
    "BoundToProcess",
    "BundleError",
    "BundleNotFound",
    "CheckpointError",
    "ControlTokenInRequest",
    "DataError",
    "DependencyMissing",
    "DowngradeRefused",
    "DownloadFailed",
    "EdgeSlmError",
    "EmptyRequest",
    "EngineError",
    "EngineNotInstalled",
    "FileAltered",
    "FileMissing",
    "FileTruncated",
    "FileUnlisted",
    "GateRefused",
    "ManifestAltered",
    "ManifestInvalid",
    "NoCommandGrammar",
    "NotSupportedByEngine",
    "OutOfMemory",
    "PathEscape",
    "RelevanceOutOfRange",
    "RequestError",
    "RequestNotText",
    "RequestTooLong",
    "SchemaVersionUnsupported",
    "SelfTestFailed",
    "SessionFull",
    "StoreNotWritable",
    "SymlinkRefused",
    "TargetExists",
    "TeacherError",
    "UnknownTask",
    "Untrusted",
    "UsedAfterFork",
    "VariantNotFound",
    "WordsOutOfRange",
]


_LONGEST = 1000  # characters of a problem


class EdgeSlmError(Exception):
    """Base of all errors. `problem`: the fault and its place; `hint`: the remedy."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, hint: str = "") -> None:
        self.problem = _line(problem)
        self.hint = hint
        super().__init__(f"{self.problem} ({hint})" if hint else self.problem)

    def at(self, place: str) -> EdgeSlmError:
        """The same error, its line beginning with its place."""
        return type(self)(f"{place}: {self.problem}", self.hint)


def _line(problem: str) -> str:
    """One line of bounded length, whatever a file or a library says in it."""
    line = " ".join(problem.splitlines())
    if len(line) <= _LONGEST:
        return line
    half = _LONGEST // 2  # the reason follows a long path: keep both ends
    return f"{line[: half - 3]}...{line[-half:]}"


def shown(value: object) -> str:
    """`repr` for an error's line: of bounded length, whatever the caller gave."""
    try:
        text = repr(value)
    except ValueError:  # Python spells out no integer of more than 4300 digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


class RequestError(EdgeSlmError):
    """The request or its command cannot be honoured."""

    code = "request"
    exit_code = 3


class EmptyRequest(RequestError):
    code = "empty_request"


class RequestNotText(RequestError):
    """Not a `str`, not valid UTF-8 (lone surrogates included), or not to be spelt in the
    model's tokens."""

    code = "request_not_text"


class RequestTooLong(RequestError):
    code = "request_too_long"


class ControlTokenInRequest(RequestError):
    code = "control_token_in_request"


class UnknownTask(RequestError):
    code = "unknown_task"


class WordsOutOfRange(RequestError):
    code = "words_out_of_range"


class RelevanceOutOfRange(RequestError):
    code = "relevance_out_of_range"


class NoCommandGrammar(RequestError):
    """The model was not trained on commands: it has no tasks and no relevance to ask for."""

    code = "no_command_grammar"


class BadSetting(RequestError):
    """A generation setting (temperature, top_p, stop …) outside its range."""

    code = "bad_setting"


class BundleError(EdgeSlmError):
    """The bundle differs from its manifest; nothing of it was loaded."""

    code = "bundle"
    exit_code = 4


class BundleNotFound(BundleError):
    code = "bundle_not_found"


class ManifestInvalid(BundleError):
    code = "manifest_invalid"


class ManifestAltered(BundleError):
    """The manifest's own digest does not match its content."""

    code = "manifest_altered"


class SchemaVersionUnsupported(BundleError):
    code = "schema_version_unsupported"


class FileMissing(BundleError):
    code = "file_missing"


class FileTruncated(BundleError):
    """The size differs from the manifest's."""

    code = "file_truncated"


class FileAltered(BundleError):
    """The size is right, the sha256 is not."""

    code = "file_altered"


class FileUnlisted(BundleError):
    code = "file_unlisted"


class SymlinkRefused(BundleError):
    code = "symlink_refused"


class PathEscape(BundleError):
    """A path in the manifest is absolute, holds `..`, or leaves the bundle."""

    code = "path_escape"


class Untrusted(BundleError):
    """Not signed by a trusted key, not of the expected digest, or altered after it was signed."""

    code = "untrusted"


class DowngradeRefused(BundleError):
    """An older version than the one that is installed."""

    code = "downgrade_refused"


class SelfTestFailed(BundleError):
    """A bundle does not run on this device as it did where it was made."""

    code = "self_test_failed"


class DownloadFailed(BundleError):
    code = "download_failed"


class StoreNotWritable(BundleError):
    """The store of installed models cannot be changed: no permission, no space left."""

    code = "store_not_writable"


class AdapterInvalid(BundleError):
    """An adapter whose file is damaged, or that was made for another model."""

    code = "adapter_invalid"


class EngineError(EdgeSlmError):
    code = "engine"
    exit_code = 5


class EngineNotInstalled(EngineError):
    code = "engine_not_installed"


class VariantNotFound(EngineError):
    """The bundle has no variant of that engine and precision."""

    code = "variant_not_found"


class NotSupportedByEngine(EngineError):
    """The engine cannot honour a setting, and falling back would be a lie."""

    code = "not_supported_by_engine"


class UsedAfterFork(EngineError):
    """A model of the parent hangs in a forked child, and so does ctranslate2 altogether; use
    spawn."""

    code = "used_after_fork"


class BoundToProcess(EngineError):
    """A loaded model, its session or a stream was to be pickled or copied."""

    code = "bound_to_process"


class SessionFull(EdgeSlmError):
    """As many requests wait for a row of the session as may."""

    code = "session_full"


class DependencyMissing(EdgeSlmError):
    code = "dependency_missing"
    exit_code = 5


class CheckpointError(EdgeSlmError):
    """The checkpoint cannot be read or converted; says which part."""

    code = "checkpoint"
    exit_code = 6


class GateRefused(EdgeSlmError):
    """A converted variant is outside its budget of fidelity or adherence."""

    code = "gate_refused"
    exit_code = 7


class DataError(EdgeSlmError):
    """Training or batch data cannot be used; says which file and line."""

    code = "data"
    exit_code = 8


class OutOfMemory(EdgeSlmError):
    """The memory of the device, or what the caller allows of it, does not suffice; the hint
    names the setting to change, or what would fit."""

    code = "out_of_memory"
    exit_code = 12


class TargetExists(EdgeSlmError):
    """The place to write to is taken; nothing is ever overwritten."""

    code = "target_exists"
    exit_code = 9


class BatchFailed(EdgeSlmError):
    """Every line of a batch failed; with --strict, any of them. The others are written."""

    code = "batch_failed"
    exit_code = 13


class TeacherError(EdgeSlmError):
    """The model that writes or judges samples cannot be used; names its server."""

    code = "teacher_failed"
    exit_code = 10


class BenchRegression(EdgeSlmError):
    """A comparison of two benchmark reports found figures worse than the tolerance allows."""

    code = "bench_regression"
    exit_code = 11
