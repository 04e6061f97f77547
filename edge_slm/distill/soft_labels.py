"""Next-token distributions of a teacher at the response tokens of records, kept on disk.

Of each distribution the k likeliest tokens are kept with their log probabilities. A folder
holds those of one teacher and k, in shards of some thousand records, each a folder of its own
that is complete or not there:

    keys.npy   per record the digest of its tokens, and the end of its rows
    rows.npy   per response token `ids` [k] and `log_p` [k] (float16); memory-mapped
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_slm_runtime.errors import DataError
from edge_slm_runtime.files import write_folder_aside

Array = npt.NDArray[Any]
_KEYS = np.dtype([("key", "V20"), ("end", "<i8")])


class SoftLabels:
    """The distributions of a folder by the tokens of a record, its prompt and its response."""

    def __init__(self, folder: Path, top_k: int, vocab_size: int) -> None:
        """Raises DataError when a file is damaged."""
        self.folder, self.top_k = folder, top_k
        ids = "<u2" if vocab_size <= 1 << 16 else "<u4"
        self._row = np.dtype([("ids", ids, (top_k,)), ("log_p", "<f2", (top_k,))])
        self._known: dict[bytes, Array] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for shard in self._shards():
            self._open(shard)

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return _key(tokens) in self._known

    def __getitem__(self, tokens: Sequence[int]) -> tuple[Array, Array]:
        """(ids, log probabilities) of a record, both [response tokens, k]."""
        rows = self._known[_key(tokens)]
        return rows["ids"], rows["log_p"]

    def add(
        self, records: Sequence[Sequence[int]], ids: Sequence[Array], log_p: Sequence[Array]
    ) -> None:
        """Writes a shard: of each record its tokens, and both arrays [response tokens, k]."""
        keys = np.empty(len(records), _KEYS)
        keys["key"] = [np.void(_key(tokens)) for tokens in records]
        keys["end"] = np.cumsum([len(part) for part in ids])
        rows = np.empty(keys["end"][-1], self._row)
        rows["ids"], rows["log_p"] = np.concatenate(ids), np.concatenate(log_p)
        last = max((int(shard.name) for shard in self._shards()), default=-1)
        with write_folder_aside(shard := self.folder / f"{last + 1:05d}") as aside:
            np.save(aside / "keys.npy", keys)
            np.save(aside / "rows.npy", rows)
        self._open(shard)

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*"))

    def _open(self, shard: Path) -> None:
        try:
            keys = np.load(shard / "keys.npy")
            rows = np.load(shard / "rows.npy", mmap_mode="r")
            fits = (keys.dtype, rows.dtype, rows.shape) == (_KEYS, self._row, (keys["end"][-1],))
        except (OSError, ValueError, LookupError):
            fits = False
        if not fits:
            raise DataError(f"{shard} is damaged", "remove it; it is computed again")
        parts = np.split(np.asarray(rows), keys["end"][:-1])
        self._known.update(zip((key.tobytes() for key in keys["key"]), parts, strict=True))


def _key(tokens: Sequence[int]) -> bytes:
    return hashlib.sha1(np.asarray(tokens, "<u4").tobytes()).digest()
