"""Compares a bundle's folder with its manifest.

Every byte that a native loader will see is read and compared first: the engines load
a flipped weight byte without a word, and their parsers are the attack surface.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from edge_slm_runtime.bundle import (
    MANIFEST,
    SIGNATURES,
    WORDS,
    Manifest,
    file_entry,
    plain_path,
    read_manifest,
)
from edge_slm_runtime.deltas import Delta
from edge_slm_runtime.errors import (
    AdapterInvalid,
    FileAltered,
    FileMissing,
    FileTruncated,
    FileUnlisted,
    ManifestInvalid,
    SymlinkRefused,
)
from edge_slm_runtime.files import reading
from edge_slm_runtime.installed import find_bundle
from edge_slm_runtime.lexicon import read_lexicon
from edge_slm_runtime.onnx_check import check_onnx
from edge_slm_runtime.onnx_paths import external_locations

_DEEPEST = 16  # folders; ours have one level


def verify(bundle: str | os.PathLike[str], *, hashes: bool = True) -> Manifest:
    """Checks the whole folder against its manifest and returns the manifest.

    bundle: its folder, or the name of an installed model.
    With `hashes=False` all but the sha256 sums is checked (names, kinds, sizes,
    where ONNX weights point), which is quick and finds accidents, not attacks.

    Raises what `verify_structure` and `verify_contents` raise.
    """
    root = find_bundle(bundle)
    manifest = verify_structure(root)
    verify_contents(root, manifest, manifest.files, hashes=hashes)
    return manifest


def verify_structure(bundle: str | os.PathLike[str]) -> Manifest:
    """The manifest, and that the folder holds plain files of its names and sizes only.

    Raises what `read_manifest` raises, SymlinkRefused, FileUnlisted, FileMissing,
    FileTruncated, and BundleError when the folder cannot be read.
    """
    root = Path(bundle)
    manifest = read_manifest(root)
    with reading(root):
        sizes = dict(_regular_files(root))
    for path in sizes:
        if path not in (MANIFEST, SIGNATURES) and path not in manifest.files:
            raise FileUnlisted(f"{path} is not in the manifest", "remove it")
    for path, entry in manifest.files.items():
        if path not in sizes:
            raise FileMissing(f"{path} is missing", "get the bundle again")
        if sizes[path] != entry.size:
            raise FileTruncated(
                f"{path} has {sizes[path]} bytes, not {entry.size}", "get the bundle again"
            )
    return manifest


def verify_contents(
    root: Path, manifest: Manifest, paths: Iterable[str], *, hashes: bool = True
) -> None:
    """The sha256 sums of the listed files `paths`, the graphs of the ONNX ones, the lexicon, and
    adapters.

    Raises FileAltered, FileMissing, PathEscape, ManifestInvalid, AdapterInvalid, and BundleError
    when a file cannot be read.
    """
    for path in paths:
        with reading(root / path):
            if hashes and file_entry(root / path) != manifest.files[path]:
                raise FileAltered(f"{path} is not the file that was listed", "get the bundle again")
            if path.endswith(".onnx"):
                _check_onnx(root, path, manifest)
            if path == WORDS:
                _check_lexicon(root)
            if path in manifest.deltas:
                _check_delta(root, path, manifest)


@contextmanager
def unchanged(root: Path, paths: Iterable[str]) -> Iterator[None]:
    """Refuses files that were written to or replaced meanwhile: what is loaded in it is what was
    checked in it.

    Raises FileAltered, SymlinkRefused, and BundleError when one is not there any more.
    """
    before = {path: _state(root, path) for path in paths}
    try:
        yield
    finally:  # also when an engine could not read what it found
        for path, state in before.items():
            if _state(root, path) != state:
                raise FileAltered(f"{path} was changed while it was loaded", "load it again")


def _state(root: Path, path: str) -> tuple[int, ...]:
    """Identity, size and times of a file: some of them differ after any change."""
    with reading(root / path):
        info = os.lstat(root / path)
    if not stat.S_ISREG(info.st_mode):
        raise SymlinkRefused(f"{path} is no plain file any more", "get the bundle again")
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _regular_files(root: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """(posix path, size) of every file; a symlink or special file is refused."""
    if below.count("/") >= _DEEPEST:
        raise FileUnlisted(f"{below[:40]}… is nested too deeply", "remove it")
    with os.scandir(root / below) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                raise SymlinkRefused(f"{path} is a symlink", "a bundle holds plain files only")
            if stat.S_ISDIR(info.st_mode):
                yield from _regular_files(root, path)
            elif stat.S_ISREG(info.st_mode):
                yield path, info.st_size
            else:
                raise FileUnlisted(f"{path} is not a plain file", "remove it")


def _check_onnx(root: Path, path: str, manifest: Manifest) -> None:
    """A graph of the manifest's model, and nothing else (`onnx_check`). Its weights may lie in
    another file; that must be a listed one of the same folder.

    onnxruntime before 1.24 follows any path. A listed file is inside the
    bundle, of known content, and no symlink: that is the whole promise.
    """
    model, folder = (root / path).read_bytes(), PurePosixPath(path).parent
    try:
        locations = external_locations(model)
    except ValueError as error:
        raise ManifestInvalid(f"{path} is not an ONNX model: {error}") from None
    sizes = {}
    for location in locations:
        plain_path(location, f"{path} keeps weights at")
        entry = manifest.files.get(str(folder / location))
        if entry is None:
            raise FileMissing(f"{path} keeps weights at {location!r}, which is not in the manifest")
        sizes[location] = entry.size
    try:
        check_onnx(model, manifest.model, sizes)
    except ValueError as error:
        raise ManifestInvalid(f"{path} is not a graph of this model: {error}") from None


def _check_delta(root: Path, path: str, manifest: Manifest) -> None:
    delta = Delta.read(root / path)
    delta.check(manifest.model, manifest.prompt, manifest.base)
    if delta.path != path:
        raise AdapterInvalid(f"{path} has the adapter {delta.name}")


def _check_lexicon(root: Path) -> None:
    try:
        read_lexicon((root / WORDS).read_bytes())
    except ValueError as error:
        raise ManifestInvalid(f"{WORDS} is no lexicon: {error}") from None
