"""The geometry of the report's charts, in the units of their SVG view boxes; the template draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trtdeploy.report.content import Histogram, StageRow

_WIDTH = 480.0
_WIDE, _VERY_WIDE = 8, 300


@dataclass(frozen=True)
class Tick:
    """A line of the grid: where, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class StagePoint:
    """One stage: its column, where its value and the ends of its interval are, and whether a loss is shown there."""

    x: float
    y: float
    y_low: float
    y_high: float
    lost: bool
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
    width, height, left, top, bottom = _WIDTH, 250.0, 54.0, 44.0, 208.0
    low = min(row.top1.low for row in rows)
    high = max(row.top1.high for row in rows)
    step = _step(max(high - low, 0.5) / 4)
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step

    def y(value: float) -> float:
        return bottom - (value - first) / (last - first) * (bottom - top)

    column = (width - left - 10) / len(rows)
    points = tuple(
        StagePoint(
            left + column * (index + 0.5), y(row.top1.value), y(row.top1.low), y(row.top1.high), row.loss_shown, row
        )
        for index, row in enumerate(rows)
    )
    count = round((last - first) / step)
    ticks = tuple(Tick(y(first + step * index), f"{first + step * index:g}") for index in range(count + 1))
    return StageChart(width, height, left, bottom, points, ticks)


def latency_chart(histogram: Histogram, percentiles: dict[str, float]) -> LatencyChart:
    """Lay out the histogram on a logarithmic axis, whose bins are equally wide; the last one holds the tail."""
    width, height, top, bottom = _WIDTH, 210.0, 34.0, 178.0
    edges, counts = histogram.edges_ms, histogram.counts
    ratio = edges[1] / edges[0]
    end_ms = edges[0] * ratio ** len(counts)
    column = (width - 20) / len(counts)

    def x(milliseconds: float) -> float:
        place = math.log(min(milliseconds, end_ms) / edges[0]) / math.log(end_ms / edges[0])
        return 10 + place * (width - 20)

    bars = []
    for index, count in enumerate(counts):
        size = count / max(counts) * (bottom - top)
        text = f"{edges[index]:.2f} to {edges[index + 1]:.2f} ms: {count} requests"
        bars.append(Bar(10 + column * index + 0.5, bottom - size, column - 1, size, text))
    return LatencyChart(
        width,
        height,
        bottom,
        tuple(bars),
        tuple(Tick(x(value), f"{value:g}") for value in _round_values(edges[0], end_ms)),
        tuple(Tick(x(value), name) for name, value in percentiles.items()),
    )


def _round_values(low: float, high: float) -> list[float]:
    """Return round values between two: 1, 2, 5 times powers of ten where the range is wide, else even steps."""
    if high / low >= _WIDE:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if high / low < _VERY_WIDE else (1,)
        values = [factor * 10.0**power for power in powers for factor in factors]
    else:
        step = _step((high - low) / 4)
        values = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [value for value in values if low <= value <= high]


def _step(rough: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999))
