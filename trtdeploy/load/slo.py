"""The highest rate at which a server keeps a promise about its latency."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from trtdeploy.load.measurement import LoadPoint

_KEEPS_UP = 0.9


class SloResult(BaseModel):
    """What the search found.

    Attributes:
        p99_ms: The promise.
        best: The highest measured rate that keeps it; None if none did.
        tried: Every rate that was measured, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    p99_ms: float
    best: LoadPoint | None
    tried: tuple[LoadPoint, ...]


def search_rate(
    measure_rate: Callable[[float], LoadPoint], *, p99_ms: float, capacity_per_s: float, steps: int = 6
) -> SloResult:
    """Bisect the rate between 0 and the capacity of a closed loop.

    Args:
        measure_rate: Measures an open loop at a rate in requests per second.
        p99_ms: Largest allowed 99th percentile; the measured value counts, not the ends of its interval.
        capacity_per_s: Where to begin from above.
        steps: How many rates to measure; the answer is within ``capacity / 2**steps`` of the highest.
    """
    low, high = 0.0, capacity_per_s
    best: LoadPoint | None = None
    tried: list[LoadPoint] = []
    for _ in range(steps):
        rate = (low + high) / 2
        point = measure_rate(rate)
        tried.append(point)
        if keeps(point, p99_ms):
            low, best = rate, point
        else:
            high = rate
    return SloResult(p99_ms=p99_ms, best=best, tried=tuple(tried))


def keeps(point: LoadPoint, p99_ms: float) -> bool:
    """Say whether a point keeps the promise and the server kept up with what was offered."""
    kept_up = point.rate_per_s is None or point.requests_per_s >= _KEEPS_UP * point.rate_per_s
    return kept_up and point.latency_ms["p99"].value <= p99_ms
