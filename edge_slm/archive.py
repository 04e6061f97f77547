"""A bundle as one file: a `.zip`, or a `.tar.zst` (needs zstandard).

The same bundle gives the same bytes. Reading takes the manifest first, and then only what that
lists, at the sizes that it lists: nothing else is written, whatever the file holds.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from edge_slm_runtime import verify
from edge_slm_runtime.bundle import MANIFEST, SIGNATURES, Manifest, read_manifest
from edge_slm_runtime.errors import (
    BadSetting,
    BundleError,
    DependencyMissing,
    EdgeSlmError,
    FileTruncated,
)
from edge_slm_runtime.files import write_aside

ZIP, TAR = ".zip", ".tar.zst"
_LIMIT = 16 << 20  # bytes of a manifest, as of `read_manifest`
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say


def is_archive(name: str) -> bool:
    """By the ending of its name."""
    return name.endswith((ZIP, TAR))


def pack(bundle: Path, out: Path) -> Manifest:
    """Writes the verified bundle as the file `out`; returns its manifest.

    Raises what `verify` raises, BadSetting (an unknown ending), TargetExists.
    """
    if not is_archive(out.name):
        raise BadSetting(f"{out.name} has no ending of an archive", f"give NAME{ZIP} or NAME{TAR}")
    manifest = verify(bundle)
    names = [MANIFEST, *[SIGNATURES] * (bundle / SIGNATURES).exists(), *sorted(manifest.files)]
    with write_aside(out, replace=False) as aside:
        writer = _write_zip if out.name.endswith(ZIP) else _write_tar
        writer(aside, {name: bundle / name for name in names})
    return manifest


def unpack(archive: Path, folder: Path) -> None:
    """Writes the bundle in `archive` into the empty `folder`; it is not verified yet.

    Raises BundleError when it is no such file, and FileTruncated when a file in it has
    another size than the manifest lists.
    """
    reader = _read_zip if archive.name.endswith(ZIP) else _read_tar
    limits: Mapping[str, int] = {MANIFEST: _LIMIT, SIGNATURES: 1 << 16}
    try:
        for name, content in reader(archive):
            if name in limits:
                _copy(content, folder / name, limits[name])
            if name == MANIFEST:  # which our writer puts first
                listed = read_manifest(folder).files
                limits = {
                    **{path: entry.size for path, entry in listed.items()},
                    SIGNATURES: 1 << 16,
                }
    except EdgeSlmError:
        raise
    except Exception as error:  # of three parsers, at any byte of a foreign file
        raise BundleError(f"{archive} cannot be unpacked: {error}", "get it again") from None
    if not (folder / MANIFEST).exists():
        raise BundleError(f"{archive} holds no {MANIFEST} at its top", "edge-slm pack makes one")


def _copy(content: IO[bytes], target: Path, limit: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        while piece := content.read(1 << 20):
            if file.tell() + len(piece) > limit:
                raise FileTruncated(
                    f"{target.name} is larger than its manifest says", "get it again"
                )
            file.write(piece)


def _write_zip(target: Path, files: Mapping[str, Path]) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, path in files.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as entry:
                shutil.copyfileobj(source, entry, 1 << 20)


def _read_zip(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if not info.is_dir():
                with opened.open(info) as content:
                    yield info.filename, content


def _write_tar(target: Path, files: Mapping[str, Path]) -> None:
    compressor = _zstandard().ZstdCompressor(level=10)
    with (
        target.open("wb") as file,
        compressor.stream_writer(file, closefd=False) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, path in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = path.stat().st_size, 0o644
            with path.open("rb") as source:
                archive.addfile(info, source)


def _read_tar(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    decompressor = _zstandard().ZstdDecompressor()
    with (
        archive.open("rb") as file,
        decompressor.stream_reader(file) as stream,
        tarfile.open(fileobj=io.BufferedReader(stream), mode="r|") as opened,
    ):
        for member in opened:
            content = opened.extractfile(member) if member.isreg() else None
            if content is not None:
                yield member.name, content


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise DependencyMissing(
            f"{TAR} needs zstandard", f"pip install 'edge-slm[store]', or take a {ZIP}"
        ) from None
    return zstandard
