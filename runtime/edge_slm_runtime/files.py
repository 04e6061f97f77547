"""Files and folders that are complete or not there: written aside, flushed to disk, renamed."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from edge_slm_runtime.errors import BundleError, DataError, TargetExists

LONGEST_LINE = 32 << 20  # bytes
_ENDLESS = 256 << 20  # bytes without the end of a line
_LONGEST_TEXT = 64 << 20  # bytes
_LOCKED_BY = 2.0  # seconds after it was made


def cache_folder() -> Path:
    """Of this user, for what can be made again. Raises OSError for a user without a home."""
    windows = sys.platform == "win32"
    folder = Path(os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME") or "")
    if not folder.is_absolute():  # the XDG specification: ignore relative ones
        try:
            folder = Path.home() / ".cache"
        except RuntimeError as error:
            raise FileNotFoundError(str(error)) from None
    if not folder.is_absolute():
        raise FileNotFoundError(f"the home folder is {folder.parent}")
    return folder / "edge-slm"


@contextmanager
def write_aside(target: Path, *, replace: bool = True, mode: int = 0o666) -> Iterator[Path]:
    """Yields the path of an empty file beside `target`; on success it takes the target's place.

    On any error it is removed and `target` stays as it was. mode: permissions of the file,
    less the umask. Raises TargetExists when `target` exists and `replace` is False.
    """
    if not replace:
        refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(target)
    try:
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        with _held(aside):
            yield aside
            _flush(aside)
            if not replace:
                refuse_existing(target)
            aside.replace(target)
            _flush_folder(target.parent)
    finally:
        aside.unlink(missing_ok=True)
        _remove_abandoned(target)


@contextmanager
def write_folder_aside(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; on success it is renamed to `target`.

    On any error it is removed. Raises TargetExists when `target` exists.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(target)
    try:
        folder.mkdir()
        with _held(folder):
            yield folder
            for path in folder.rglob("*"):
                _flush_folder(path) if path.is_dir() else _flush(path)
            _flush_folder(folder)
            refuse_existing(target)  # rename would replace an empty folder
            folder.rename(target)
            _flush_folder(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_abandoned(target)


def read_text(path: Path) -> str:
    """A small file in UTF-8. Raises OSError for a large one too: devices never end."""
    with path.open("rb") as file:
        content = file.read(_LONGEST_TEXT + 1)
    if len(content) > _LONGEST_TEXT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content.decode("utf-8")


def read_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Its lines; one of more than LONGEST_LINE bytes is cut after one byte more.

    Raises DataError when the end of a line does not come: a device, or no file of lines.
    """
    while line := stream.readline(LONGEST_LINE + 1):
        size, rest = len(line), line
        while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE + 1)
            size += len(rest)
            if size > _ENDLESS:
                raise _endless()
        yield line


def copy_lines(stream: IO[bytes], target: IO[bytes]) -> None:
    """Copies what `read_lines` can read. Raises DataError as it does."""
    size = 0
    while piece := stream.read(1 << 20):
        end = piece.rfind(b"\n")
        size = len(piece) - 1 - end if end >= 0 else size + len(piece)
        if size > _ENDLESS:
            raise _endless()
        target.write(piece)


def _endless() -> DataError:
    return DataError(
        f"the input has a line of more than {_ENDLESS >> 20} MiB", "give a file of JSON lines"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """No permission, a disk error, removed meanwhile: a BundleError that names the file."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise BundleError(f"{where} cannot be read: {why}") from None


def write_text(text: str, target: Path) -> None:
    """UTF-8, replaces `target`."""
    with write_aside(target) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(data: Any, target: Path) -> None:
    """JSON for people to read, replaces `target`."""
    write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", target)


def write_jsonl(rows: Iterable[Any], target: Path) -> None:
    """One JSON value per line, replaces `target`."""
    write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), target)


def refuse_existing(target: Path) -> None:
    """Raises TargetExists for anything at `target`, a broken link too."""
    if target.exists() or target.is_symlink():
        raise TargetExists(f"{target} exists already", "remove it or choose another name")


def lock(file: IO[Any], path: Path, *, wait: bool = False) -> None:
    """Locks an open file for this process until it is closed (POSIX; elsewhere no lock).

    The kernel releases the lock of a process that ends. path: for the message. Raises
    DataError when another process holds the lock, unless `wait`.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise DataError(f"another process is writing {path}", "wait for it to end") from None


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """While no other process has the lock of `folder` (POSIX; elsewhere no lock). Raises
    DataError when one has."""
    if os.name != "posix":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _try_lock(descriptor):
            raise DataError(f"another process is writing {folder}", "wait for it to end")
        yield
    finally:
        os.close(descriptor)


def open_locked(path: Path) -> BinaryIO:
    """The file at `path`, made where there is none, for appending and reading, locked for this
    process. Raises DataError when another process holds the lock.

    Who held it before may have renamed or removed the file that was opened: that of `path`
    is wanted.
    """
    while True:
        file = path.open("ab+")
        try:
            lock(file, path)
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.urandom(4).hex()}")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Locks a file or folder that is being written (POSIX), so that it is not abandoned."""
    if os.name != "posix":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Removes unfinished files of killed processes beside `target`: those that are not locked,
    and old enough that their writer would have locked them."""
    if os.name != "posix":
        return
    for path in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                old = time.time() - path.stat().st_mtime > _LOCKED_BY
                if old and _try_lock(descriptor):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Whether this process holds the lock now."""
    import fcntl

    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable (POSIX; elsewhere a folder cannot be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
