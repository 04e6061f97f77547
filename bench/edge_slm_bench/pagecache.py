"""Cold loads: a model's files put out of the page cache before a process starts."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def evict(path: str | Path) -> bool:
    """Drops the pages of a file, or of every file of a folder, and says whether they are
    gone: another process may hold them, and some file systems keep them."""
    files = [Path(path)] if Path(path).is_file() else list(Path(path).rglob("*"))
    gone = True
    for file in files:
        if not file.is_file() or not file.stat().st_size:
            continue
        if not hasattr(os, "posix_fadvise"):
            return False
        with file.open("rb") as handle:
            os.fsync(handle.fileno())  # pages not yet written cannot be dropped
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        gone &= resident_share(file) < 0.05
    return gone


def resident_share(file: Path) -> float:
    """Share of a file's pages in the page cache (mincore); 1 where that cannot be asked."""
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, mmap.MAP_PRIVATE) as view:
        pages = (len(view) + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        state = (ctypes.c_ubyte * pages)()
        # A private writable mapping lends its address; nothing is ever written.
        anchor = ctypes.c_char.from_buffer(view)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            status = libc.mincore(
                ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(view)), state
            )
        except (OSError, AttributeError):
            return 1.0
        finally:
            del anchor
    return 1.0 if status else sum(page & 1 for page in state) / pages
