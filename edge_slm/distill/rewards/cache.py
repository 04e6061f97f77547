"""Results of expensive computations on disk, under the digest of their inputs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm_runtime.files import lock


def digest(*parts: str) -> bytes:
    """20 bytes; no two lists of parts share one."""
    framed = b"".join(b"%d:%s" % (len(raw), raw) for raw in map(str.encode, parts))
    return hashlib.sha1(framed).digest()


class RowCache:
    """Rows of 20-byte key + `width` numbers, append-only; in memory only if file is None.

    Resumable after a crash: an incomplete last row is never read, and the next row is
    written over it. Several processes may share the file.
    """

    def __init__(self, file: Path | None, width: int, dtype: npt.DTypeLike) -> None:
        self._file = file
        self._row = np.dtype([("key", "V20"), ("values", dtype, (width,))])
        self._known: dict[bytes, npt.NDArray[Any]] = {}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            raw = file.read_bytes() if file.exists() else b""
            whole = len(raw) - len(raw) % self._row.itemsize
            rows = np.frombuffer(raw[:whole], self._row)
            self._known = {row["key"].tobytes(): row["values"] for row in rows}

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def __getitem__(self, key: bytes) -> npt.NDArray[Any]:
        """The values, [width], in the precision of the file."""
        return self._known[key]

    def add(self, rows: Iterable[tuple[bytes, npt.ArrayLike]]) -> None:
        """The rows survive the end of this process when it returns."""
        block = np.array([(key, values) for key, values in rows], self._row)
        self._known.update((row["key"].tobytes(), row["values"]) for row in block)
        if self._file is not None:
            with self._file.open("ab") as file:
                lock(file, self._file, wait=True)
                size = file.seek(0, os.SEEK_END)
                file.truncate(size - size % self._row.itemsize)
                file.write(block.tobytes())
