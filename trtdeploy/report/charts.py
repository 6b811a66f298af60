"""The geometry of the report's charts, in the units of their SVG view boxes; the template draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trtdeploy.report.content import Histogram, StageRow


@dataclass(frozen=True)
class Tick:
    """A line of the grid: where, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class StagePoint:
    """One stage: its column, and where its value and the ends of its interval are."""

    x: float
    y: float
    y_low: float
    y_high: float
    row: StageRow


@dataclass(frozen=True)
class StageChart:
    """Top-1 per stage, left to right."""

    width: float
    height: float
    left: float
    bottom: float
    points: tuple[StagePoint, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Bar:
    """One bin of a histogram."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class LatencyChart:
    """The latency distribution with its percentiles as vertical lines."""

    width: float
    height: float
    bottom: float
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    marks: tuple[Tick, ...]


def stage_chart(rows: tuple[StageRow, ...]) -> StageChart:
    """Lay out the ledger's stages."""
    width, height, left, top, bottom = 640.0, 260.0, 46.0, 28.0, 216.0
    low = min(row.top1.low for row in rows)
    high = max(row.top1.high for row in rows)
    step = _step(max(high - low, 0.5) / 4)
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step

    def y(value: float) -> float:
        return bottom - (value - first) / (last - first) * (bottom - top)

    column = (width - left - 10) / len(rows)
    points = tuple(
        StagePoint(left + column * (index + 0.5), y(row.top1.value), y(row.top1.low), y(row.top1.high), row)
        for index, row in enumerate(rows)
    )
    count = round((last - first) / step)
    ticks = tuple(Tick(y(first + step * index), f"{first + step * index:g}") for index in range(count + 1))
    return StageChart(width, height, left, bottom, points, ticks)


def latency_chart(histogram: Histogram, percentiles: dict[str, float]) -> LatencyChart:
    """Lay out the histogram; its last bin holds the tail and is drawn as wide as the others."""
    width, height, top, bottom = 640.0, 220.0, 34.0, 186.0
    edges, counts = histogram.edges_ms, histogram.counts
    bin_ms = edges[1] - edges[0]
    end_ms = edges[0] + bin_ms * len(counts)
    column = (width - 20) / len(counts)

    def x(milliseconds: float) -> float:
        return 10 + (min(milliseconds, end_ms) - edges[0]) / (end_ms - edges[0]) * (width - 20)

    bars = []
    for index, count in enumerate(counts):
        size = count / max(counts) * (bottom - top)
        text = f"{edges[index]:.2f} to {edges[index + 1]:.2f} ms: {count} requests"
        bars.append(Bar(10 + column * index + 0.5, bottom - size, column - 1, size, text))
    step = _step((end_ms - edges[0]) / 5)
    first = math.ceil(edges[0] / step)
    values = [number * step for number in range(first, math.floor(end_ms / step) + 1)]
    return LatencyChart(
        width,
        height,
        bottom,
        tuple(bars),
        tuple(Tick(x(value), f"{value:g}") for value in values),
        tuple(Tick(x(value), name) for name, value in percentiles.items()),
    )


def _step(rough: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999))
