"""The highest rate at which a server keeps a promise about its latency."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from trtdeploy.load.measurement import LoadPoint

_KEEPS_UP = 0.9
_HIGHER = 1.5
_HIGHER_STEPS = 3
_CONFIRMATIONS = 3
_LOOKED_AT = 100
_CONFIRMED_WITH = 400
MeasureRate = Callable[[float, int], LoadPoint]
"""Measures an open loop at a rate in requests per second, over at least so many requests where that is not too long."""


class SloResult(BaseModel):
    """What the search found.

    Attributes:
        p99_ms: The promise.
        best: The highest rate that keeps it, as the longer measurement found that confirms it; None if there is none.
        tried: Every rate that the search measured, in order.
        confirmations: The longer measurements; the last one is ``best``, where there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    p99_ms: float
    best: LoadPoint | None
    tried: tuple[LoadPoint, ...]
    confirmations: tuple[LoadPoint, ...]


def search_rate(measure_rate: MeasureRate, *, p99_ms: float, capacity_per_s: float, steps: int = 6) -> SloResult:
    """Bisect the rate between 0 and the capacity of a closed loop, then confirm the answer with more requests.

    Other work on a machine makes a server slower, never faster. So a rate that breaks the promise, but at which the
    server kept pace and answered half of the requests in time, is measured twice before that counts. Where no rate
    fails, the closed loop has not found the capacity, and higher ones are tried. A rate that the longer measurement
    does not confirm gives way to the next one.

    Args:
        measure_rate: Measures a rate.
        p99_ms: Largest allowed 99th percentile; the measured value counts, not the ends of its interval.
        capacity_per_s: Where to begin from above.
        steps: How many rates to bisect to; the answer is within ``capacity / 2**steps`` of the highest.
    """
    tried: list[LoadPoint] = []
    passed: list[float] = []

    def holds(rate: float) -> bool:
        point = measure_rate(rate, _LOOKED_AT)
        tried.append(point)
        if not keeps(point, p99_ms) and keeps_up(point) and point.latency_ms["p50"].value <= p99_ms:
            point = measure_rate(rate, _LOOKED_AT)
            tried.append(point)
        if keeps(point, p99_ms):
            passed.append(rate)
        return keeps(point, p99_ms)

    low, high = 0.0, capacity_per_s
    for _ in range(steps):
        rate = (low + high) / 2
        if holds(rate):
            low = rate
        else:
            high = rate
    for _ in range(_HIGHER_STEPS if high == capacity_per_s else 0):
        if not holds(high):
            break
        high *= _HIGHER
    confirmations: list[LoadPoint] = []
    best = None
    for rate in sorted(passed, reverse=True)[:_CONFIRMATIONS]:
        confirmations.append(measure_rate(rate, _CONFIRMED_WITH))
        if keeps(confirmations[-1], p99_ms):
            best = confirmations[-1]
            break
    return SloResult(p99_ms=p99_ms, best=best, tried=tuple(tried), confirmations=tuple(confirmations))


def keeps(point: LoadPoint, p99_ms: float) -> bool:
    """Say whether a point keeps the promise: the server kept up with what was offered, and refused nothing."""
    return keeps_up(point) and point.refused == 0 and point.latency_ms["p99"].value <= p99_ms


def keeps_up(point: LoadPoint) -> bool:
    """Say whether answers kept up with what came due, which is not quite the mean rate in so short a time."""
    offered = point.offered_per_s if point.offered_per_s is not None else point.rate_per_s
    return offered is None or point.requests_per_s >= _KEEPS_UP * offered
