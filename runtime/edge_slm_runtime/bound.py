"""What lives in one process: it has threads, native memory and locks, which no copy can have."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

from edge_slm_runtime.errors import BoundToProcess


class Bound:
    """Objects that `pickle`, `copy` and `multiprocessing` refuse with an error of ours."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raises BoundToProcess."""
        raise BoundToProcess(
            f"a {type(self).__name__} can be neither pickled nor copied",
            "load the model in the process that uses it; requests and answers can be sent",
        )
