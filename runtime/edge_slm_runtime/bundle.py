"""The bundle: a plain folder that is refused unless it matches its manifest exactly.

    manifest.json   model, prompt form, variants, goldens, provenance, digests
    manifest.sig    who made it, where it is signed
    tokenizer.json
    words.txt       the lexicon (see `lexicon`), where it has one
    deltas/…        adapters that requests choose from (see `deltas`), where it has some
    numba-int8/…, onnx-int8/…, ctranslate2-int8/…   one folder per variant

This module owns the format for readers and writers alike; `integrity` compares a
folder with its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any

from edge_slm_runtime.command import Command
from edge_slm_runtime.decoder import LARGEST_LAYERS, Decoder, gpt2
from edge_slm_runtime.deltas import FOLDER, base_digest
from edge_slm_runtime.engines import ENGINES, PRECISIONS, engine_class
from edge_slm_runtime.errors import (
    BundleNotFound,
    FileMissing,
    ManifestAltered,
    ManifestInvalid,
    PathEscape,
    RequestError,
    SchemaVersionUnsupported,
    SymlinkRefused,
    shown,
)
from edge_slm_runtime.files import reading
from edge_slm_runtime.installed import find_bundle
from edge_slm_runtime.prompt import PromptForm

MANIFEST = "manifest.json"
SIGNATURES = "manifest.sig"  # not listed, for it is made of the manifest: see `signatures`
TOKENIZER = "tokenizer.json"
WORDS = "words.txt"
SCHEMA_VERSION = 1

_LARGEST_NUMBER = 1 << 53
_MANIFEST_LIMIT = 16 << 20  # bytes; a real one is some kilobytes


@dataclass(frozen=True, slots=True)
class Variant:
    """One engine × precision of the model. Sizes in bytes; `fidelity` against fp32,
    `adherence` to commands by itself; both as measured when it was converted.
    peak_rss_mb: MiB, by `memory.memory_estimate` when it was converted."""

    name: str
    engine: str
    precision: str
    path: str
    bytes: int
    weight_bytes_per_token: int
    fidelity: Mapping[str, float] | None = None
    adherence: Mapping[str, float] | None = None
    peak_rss_mb: float | None = None


@dataclass(frozen=True, slots=True)
class Golden:
    """A request and the greedy token ids that each variant must give for it."""

    request: str
    command: Command
    max_new_tokens: int
    ids: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class FileEntry:
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json as data; `to_json` adds the digest, `from_json` checks it."""

    name: str
    model: Decoder
    prompt: PromptForm
    variants: tuple[Variant, ...]
    files: Mapping[str, FileEntry]
    parameters: int = 0
    goldens: tuple[Golden, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0  # of the releases of a name; a store installs no lower one

    @property
    def digest(self) -> str:
        return str(self.to_json()["digest"])

    @property
    def base(self) -> str:
        """The digest of the weights that adapters of this model are made for, by what its
        provenance says."""
        digests = self.provenance.get("checkpoint")
        if not isinstance(digests, dict) or not all(isinstance(d, str) for d in digests.values()):
            return "unknown"
        return base_digest(digests)

    @property
    def deltas(self) -> list[str]:
        """The listed files of adapters."""
        return [path for path in self.files if path.startswith(FOLDER)]

    def files_of(self, variant: Variant) -> list[str]:
        """The listed files that loading `variant` reads, those of the text side included."""
        below = f"{variant.path}/"
        common = (TOKENIZER, WORDS)
        return [path for path in self.files if path in common or path.startswith((below, FOLDER))]

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "model": {**self.model.to_json(), "parameters": self.parameters},
            **self.prompt.to_json(),
            "variants": [asdict(variant) for variant in self.variants],
            "goldens": [
                {
                    "request": golden.request,
                    "command": golden.command.as_dict(),
                    "max_new_tokens": golden.max_new_tokens,
                    "ids": {name: list(ids) for name, ids in golden.ids.items()},
                }
                for golden in self.goldens
            ],
            "provenance": dict(self.provenance),
            "files": {path: asdict(entry) for path, entry in sorted(self.files.items())},
        }
        if self.version:
            data["version"] = self.version
        data["digest"] = manifest_digest(data)
        return data

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Checks version, digest, shape and paths, in that order.

        Raises SchemaVersionUnsupported, ManifestAltered, ManifestInvalid, PathEscape.
        """
        if not isinstance(data, dict):
            raise ManifestInvalid(f"{MANIFEST} must hold a JSON object")
        version = data.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise SchemaVersionUnsupported(
                f"{MANIFEST} has schema_version {version!r}",
                f"this edge-slm reads version {SCHEMA_VERSION}; update it, or convert again",
            )
        if data.get("digest") != manifest_digest(data):
            raise ManifestAltered(f"{MANIFEST} does not match its digest", "get the bundle again")
        try:
            manifest = cls(
                name=_typed(data["name"], str),
                model=_decoder(data["model"]),
                parameters=_number(data["model"]["parameters"], int),
                prompt=PromptForm.from_json(data),
                variants=tuple(_record(Variant, item) for item in data["variants"]),
                goldens=tuple(
                    Golden(
                        _typed(item["request"], str),
                        Command(**item["command"]),
                        _typed(item["max_new_tokens"], int),
                        {n: tuple(_typed(i, int) for i in v) for n, v in item["ids"].items()},
                    )
                    for item in data["goldens"]
                ),
                provenance=_typed(data["provenance"], dict),
                version=_number(data.get("version", 0), int),
                files={p: _record(FileEntry, e) for p, e in data["files"].items()},
            )
            for golden in manifest.goldens:
                manifest.prompt.check(golden.command)
        except RequestError as error:
            raise ManifestInvalid(f"{MANIFEST} has a golden with {error.problem}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestInvalid(f"{MANIFEST} is malformed: {error!r}") from None
        _check_paths(manifest)
        return manifest


def manifest_digest(data: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a manifest without its `digest`."""
    body = {key: value for key, value in data.items() if key != "digest"}
    try:
        text = json.dumps(
            body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestInvalid(f"{MANIFEST} has no canonical form: {error}") from None


def file_entry(path: Path) -> FileEntry:
    """sha256 and size of a file, read piece by piece: a mapped one would count as memory."""
    digest, size, piece = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            size += count
    return FileEntry(digest.hexdigest(), size)


def read_manifest(bundle: str | os.PathLike[str]) -> Manifest:
    """Reads and checks manifest.json alone; looks at no other file.

    bundle: its folder, or the name of an installed model. Raises BundleNotFound, SymlinkRefused,
    what `Manifest.from_json` raises, and BundleError when it cannot be read.
    """
    root = find_bundle(bundle)
    path = root / MANIFEST
    with reading(path):
        if not root.is_dir():
            raise BundleNotFound(
                f"no bundle folder at {root}", "give the folder with manifest.json"
            )
        if path.is_symlink():
            raise SymlinkRefused(f"{MANIFEST} is a symlink")
        if not path.is_file():
            raise BundleNotFound(f"{root} has no {MANIFEST}", "give the folder with manifest.json")
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise ManifestInvalid(f"{MANIFEST} is larger than {_MANIFEST_LIMIT >> 20} MiB")
        content = path.read_bytes()
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"{MANIFEST} is not JSON: {error}") from None
    return Manifest.from_json(data)


def _check_paths(manifest: Manifest) -> None:
    for path in manifest.files:
        plain_path(path, f"{MANIFEST} lists")
    for own in (MANIFEST, SIGNATURES):
        if own in manifest.files:
            raise ManifestInvalid(f"{MANIFEST} lists {own}")
    names = [variant.name for variant in manifest.variants]
    if len(set(names)) != len(names):
        raise ManifestInvalid(f"{MANIFEST} names a variant twice")
    needed = [TOKENIZER]
    for variant in manifest.variants:
        plain_path(variant.path, f"variant {variant.name} is at")
        if variant.engine not in ENGINES:
            raise ManifestInvalid(f"variant {variant.name} is for engine {variant.engine!r}")
        if variant.precision not in PRECISIONS:
            raise ManifestInvalid(f"variant {variant.name} is of precision {variant.precision!r}")
        needed.append(f"{variant.path}/{engine_class(variant.engine).main_file}")
    for path in needed:
        if path not in manifest.files:
            raise FileMissing(f"{path} is not in the manifest", "convert again")


def plain_path(path: str, what: str) -> None:
    """A relative posix path that stays where it is, on every platform."""
    bad = (
        not path
        or "\\" in path
        or ":" in path  # drives and NTFS streams
        or any(ord(char) < 32 for char in path)
        or any(part in ("", ".", "..") for part in path.split("/"))
    )
    if bad:
        raise PathEscape(f"{what} {path!r}", "only plain paths inside the bundle are allowed")


def _decoder(data: Any) -> Decoder:
    """The model of a manifest; bundles written before `Decoder` was there say less of a GPT-2.

    Raises KeyError, TypeError, ValueError.
    """
    facts = {key: value for key, value in _typed(data, dict).items() if key != "parameters"}
    if _typed(facts["architecture"], str) == "gpt2" and len(facts) == 6:
        sizes = {key: _typed(facts[key], int) for key in facts if key != "architecture"}
        if not 1 <= sizes["heads"] <= sizes["width"] or sizes["layers"] > LARGEST_LAYERS:
            raise ValueError("the sizes of the model do not fit together")
        facts = asdict(gpt2(**sizes))
    return Decoder.from_json(facts)


def _typed(value: Any, kind: type | UnionType) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {getattr(kind, '__name__', kind)}, got {shown(value)}")
    return value


def _number(value: Any, kind: type | UnionType) -> Any:
    """0 or more, and of a size that can be computed with and shown."""
    if not 0 <= _typed(value, kind) <= _LARGEST_NUMBER:
        raise ValueError(f"{shown(value)} is out of range")
    return value


_KINDS: dict[str, type] = {"str": str, "int": int}


def _record(cls: type, data: Any) -> Any:
    """A flat dataclass from a JSON object with exactly its fields."""
    record = cls(**_typed(data, dict))
    for item in fields(cls):
        value = getattr(record, item.name)
        if kind := _KINDS.get(str(item.type)):
            _typed(value, kind)
        if item.name == "peak_rss_mb" and value is not None:
            _number(value, float | int)
        if isinstance(value, int):
            _number(value, int)
        if item.name in ("fidelity", "adherence") and value is not None:
            for figure in _typed(value, dict).values():
                _typed(figure, float | int)
                if not abs(figure) <= _LARGEST_NUMBER:
                    raise ValueError(f"{item.name} has a figure of {shown(figure)}")
    return record
