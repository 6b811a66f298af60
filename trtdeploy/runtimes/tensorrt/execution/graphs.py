"""Running an enqueue as a CUDA graph where that is possible, and saying why where it is not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

from trtdeploy.cuda.device import Device
from trtdeploy.cuda.graphs import GraphCache, capture
from trtdeploy.cuda.streams import Stream
from trtdeploy.errors import CudaError

logger = logging.getLogger(__name__)

_BEFORE_CAPTURE = 2
"""Plain runs of a shape before it is captured: one that was seen once may not return."""
_REMEMBERED = 256


class GraphRunner:
    """Keeps the CUDA graphs of one context, one per profile, shapes and addresses.

    Args:
        device: The GPU.
        capacity: How many graphs to keep; 0 captures none.
    """

    def __init__(self, device: Device, capacity: int) -> None:
        self._cache = GraphCache(device, capacity) if capacity else None
        self._seen: dict[Hashable, int] = {}
        self._reason = "" if capacity else "cuda_graphs=0"

    @property
    def enabled(self) -> bool:
        """Whether graphs are captured."""
        return self._cache is not None and not self._reason

    def captures_next(self, key: Hashable) -> bool:
        """Say whether the next run of this key is followed by its capture."""
        if self._cache is None or self._reason or key in self._cache:
            return False
        return self._seen.get(key, 0) + 1 >= _BEFORE_CAPTURE

    def forbid(self, reason: str) -> None:
        """Capture nothing from now on; the reason is reported."""
        if not self._reason:
            self._reason = reason
            self.forget()

    def forget(self) -> None:
        """Drop all graphs: an address that they hold is no longer valid."""
        self._seen.clear()
        if self._cache is not None:
            self._cache.clear()

    def run(self, key: Hashable, stream: Stream, enqueue: Callable[[], bool]) -> bool:
        """Enqueue: as a graph if this key has one, plainly otherwise.

        Returns:
            False if TensorRT refused.
        """
        if self._cache is None or self._reason:
            return enqueue()
        graph = self._cache.get(key)
        if graph is not None:
            self._cache.launch(graph, stream)
            return True
        if not enqueue():
            return False
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] >= _BEFORE_CAPTURE:
            self._capture(key, stream, enqueue)
        return True

    def _capture(self, key: Hashable, stream: Stream, enqueue: Callable[[], bool]) -> None:
        """Capture for the next time, right after a plain run.

        TensorRT does what a new shape or profile asks for in the first enqueue after it, and that cannot be captured:
        so the enqueue before has to have been one of this very key.
        """
        if self._cache is None:
            return
        # an evicted one has to come so often again: captures cost more than they save where shapes never settle
        del self._seen[key]
        try:
            self._cache.put(key, capture(stream, enqueue))
        except CudaError as error:
            self.forbid(error.message)
            logger.info("no CUDA graphs: %s", error.message)

    def report(self) -> dict[str, int | str]:
        """Return counts, and the reason if there are no graphs."""
        counts: dict[str, int | str] = dict(self._cache.counts()) if self._cache is not None else {}
        if self._reason:
            counts["reason"] = self._reason
        return counts

    def close(self) -> None:
        """Release the graphs; nothing of them may be running."""
        if self._cache is not None:
            self._cache.clear()
