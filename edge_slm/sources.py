"""Where a bundle to install comes from: a folder, an archive, an address, or the hub.

At an address that is no archive, and on the hub, the manifest is fetched first and then every
file that it lists. Downloads are kept until they are installed, and continued where they
stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from edge_slm.archive import is_archive, unpack
from edge_slm.progress import StageProgress, silent
from edge_slm_runtime.bundle import MANIFEST, SIGNATURES, FileEntry, file_entry, read_manifest
from edge_slm_runtime.errors import DownloadFailed
from edge_slm_runtime.files import locked_folder

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_TIMEOUT = 30.0  # seconds without a byte
_PIECE = 1 << 18


@contextmanager
def fetched(source: str, downloads: Path, report: StageProgress = silent) -> Iterator[Path]:
    """The bundle folder of a source, not verified yet; what was downloaded for it is removed
    when the block ends well.

    source: a folder, an archive (see `archive`), an http(s) address of either, or OWNER/NAME on
    the hub (https://huggingface.co, or $HF_ENDPOINT). downloads: a folder for what is not
    complete yet. Raises DownloadFailed, and what `unpack` and `read_manifest` raise.
    """
    local = Path(source)
    address = _address(source)
    if address is None and not is_archive(source):
        yield local
        return
    if address is None:
        with TemporaryDirectory(prefix="edge-slm-") as scratch:
            unpack(local, Path(scratch))
            yield Path(scratch)
        return
    place = downloads / hashlib.sha256(address.encode()).hexdigest()[:32]
    place.mkdir(parents=True, exist_ok=True)
    with locked_folder(place):
        folder = place / "bundle"
        if is_archive(urlsplit(address).path):
            archive = place / urlsplit(address).path.rsplit("/", 1)[-1]
            _download(address, archive, report)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                unpack(archive, folder)
            except Exception:
                archive.unlink()  # what is damaged is not continued
                raise
        else:
            _download_folder(address, folder, report)
        yield folder
    shutil.rmtree(place, ignore_errors=True)


def _address(source: str) -> str | None:
    """Of what is to be downloaded; None for what lies on this machine."""
    if source.startswith(("http://", "https://")):
        return source
    if Path(source).exists() or not _HUB_NAME.fullmatch(source) or is_archive(source):
        return None
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{source}/resolve/main"


def _download_folder(address: str, folder: Path, report: StageProgress) -> None:
    base = address.rstrip("/")
    folder.mkdir(exist_ok=True)
    for name in (MANIFEST, SIGNATURES):  # always anew: a release may have taken their place
        (folder / name).unlink(missing_ok=True)
    _download(f"{base}/{MANIFEST}", folder / MANIFEST, silent)
    with suppress(_NotThere):
        _download(f"{base}/{SIGNATURES}", folder / SIGNATURES, silent)
    for path, entry in read_manifest(folder).files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        _download(f"{base}/{quote(path)}", folder / path, report, entry)


class _NotThere(DownloadFailed):
    """The server has no such file."""


def _download(
    address: str, target: Path, report: StageProgress, expected: FileEntry | None = None
) -> None:
    """Into `target`, unless it is there; by way of a part that is continued later.

    expected: what it must be; a part that leads to anything else is fetched again, once.
    """
    if target.exists() and (expected is None or file_entry(target) == expected):
        return
    part = target.with_name(f"{target.name}.part")
    for whole in (False, True):
        if whole:
            part.unlink(missing_ok=True)
        continued = part.exists()
        _fetch(address, part, report, expected.size if expected else None)
        if expected is None or file_entry(part) == expected:
            part.replace(target)
            return
        if not continued:
            break
    part.unlink()
    raise DownloadFailed(f"{address} is not the file that the manifest lists", "try again")


def _fetch(address: str, part: Path, report: StageProgress, limit: int | None) -> None:
    """Appends to `part` what it lacks. Raises DownloadFailed; the part stays."""
    tag = part.with_name(f"{part.name}.etag")
    known = tag.read_text("utf-8") if tag.exists() else ""  # without one nothing is continued
    start = part.stat().st_size if part.exists() and known else 0
    headers = {"User-Agent": "edge-slm"}
    if start:  # If-Range: a file that has changed since is sent whole
        headers |= {"Range": f"bytes={start}-", "If-Range": known}
    try:
        with urlopen(Request(address, headers=headers), timeout=_TIMEOUT) as answer:
            done = start if answer.status == 206 else 0
            tag.write_text(answer.headers.get("ETag", ""), "utf-8")
            total = done + int(answer.headers.get("Content-Length") or 0)
            with part.open("ab") as file:
                file.truncate(done)
                while piece := answer.read(_PIECE):
                    done += len(piece)
                    if limit is not None and done > limit:
                        raise DownloadFailed(f"{address} is longer than the manifest lists")
                    file.write(piece)
                    report(f"download {part.stem}", done, max(done, total), "")
        if done < total:
            raise DownloadFailed(
                f"{address}: the connection ended after {done} of {total} bytes",
                "try again: it continues there",
            )
    except HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send
            tag.unlink(missing_ok=True)
            return
        kind = _NotThere if error.code in (403, 404) else DownloadFailed
        raise kind(f"{address}: the server answers {error.code} {error.reason}") from None
    except (OSError, ValueError, HTTPException) as error:
        raise DownloadFailed(
            f"{address}: {error}", "try again: it continues where it stopped"
        ) from None
    tag.unlink(missing_ok=True)
