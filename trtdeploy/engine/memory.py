"""What an engine holds in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by owner, at one moment.

    Attributes:
        runtime: What the loaded plan holds, by the runtime's own names.
        in_flight: Inputs of running inferences, by context number.
        queued: Copies of inputs that wait for a context.
    """

    runtime: Mapping[str, int]
    in_flight: tuple[int, ...]
    queued: int

    @property
    def total(self) -> int:
        """Sum over all owners."""
        return sum(self.runtime.values()) + sum(self.in_flight) + self.queued
