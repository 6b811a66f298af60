"""The picture of a sweep: throughput against the tail of the latency, with the Pareto front."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtdeploy.errors import RuntimeUnavailableError, UsageError
from trtdeploy.files import atomic_write
from trtdeploy.load.sweep.choice import SweepPoint, pareto
from trtdeploy.load.sweep.space import Candidate

FORMATS = (".png", ".svg")
# blue, orange, green, purple, sky, vermilion: told apart by the colour-blind (Okabe and Ito)
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _SOFT = "#222222", "#777777"
_LOG_FROM = 8
_KEY_ROWS = 14


def check_chart(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is measured for it.

    Raises:
        UsageError: The file is neither ``.png`` nor ``.svg``.
        RuntimeUnavailableError: matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"--plot {path} must end in {' or '.join(FORMATS)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailableError(
            "A plot is drawn by matplotlib.", hint="pip install 'trtdeploy[report]'"
        ) from error


def draw_pareto(
    path: Path, points: Sequence[SweepPoint], *, title: str, deployed: Candidate, slo_p99_ms: float | None = None
) -> None:
    """Draw every measured load, number those on the front, and name these beside the picture.

    Args:
        path: ``.png`` or ``.svg``.
        points: What was measured.
        title: What of.
        deployed: How the model was served before: these points are ringed.
        slo_p99_ms: A promise about p99, drawn as a line.

    Raises:
        UsageError: See ``check_chart``.
        RuntimeUnavailableError: See ``check_chart``.
    """
    check_chart(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 5.6), layout="constrained", facecolor="white")
    axes, key = figure.subplots(1, 2, width_ratios=(9, 4))
    front = pareto(points)
    _draw_points(axes, points, front, deployed)
    if slo_p99_ms is not None:
        axes.axvline(
            slo_p99_ms, color=_COLOURS[5], linewidth=1.2, linestyle=(0, (5, 3)), label=f"p99 of {slo_p99_ms:g} ms"
        )
    _scale(axes, points, slo_p99_ms)
    _draw_front(axes, front)
    axes.set_xlabel("99th percentile of the latency (ms), less is better", fontsize=9, color=_INK)
    axes.set_ylabel("throughput (samples/s), more is better", fontsize=9, color=_INK)
    axes.grid(color="0.92", which="both")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=6, frameon=False)
    _draw_key(key, front)
    figure.suptitle(title, fontsize=10, color=_INK, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=150)
    atomic_write(path, buffer.getvalue())


def _draw_points(axes: Any, points: Sequence[SweepPoint], front: Sequence[SweepPoint], deployed: Candidate) -> None:
    counts = sorted({entry.candidate.instances for entry in points})
    best = {id(entry) for entry in front}
    for index, count in enumerate(counts):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        named = f"{count} instance{'s' if count > 1 else ''}"
        axes.plot([], [], linestyle="none", marker=marker, markersize=6, color=colour, label=named)
        for stable in (True, False):
            there = [entry for entry in points if entry.candidate.instances == count and entry.point.stable is stable]
            if there:
                look = {"markerfacecolor": colour if stable else "white", "markeredgecolor": colour}
                _mark(axes, there, marker=marker, markersize=6, **look)
        chosen = [entry for entry in points if entry.candidate.instances == count and id(entry) in best]
        _mark(axes, chosen, marker=marker, markersize=8, markerfacecolor=colour, markeredgecolor=_INK)
    if not all(entry.point.stable for entry in points):
        axes.plot([], [], linestyle="none", marker="o", markerfacecolor="white", color=_SOFT, label="not stable")
    ringed = [entry for entry in points if entry.candidate == deployed]
    ring = {"markerfacecolor": "none", "markeredgecolor": _INK, "label": "as deployed"}
    _mark(axes, ringed, marker="o", markersize=12, **ring)


def _mark(axes: Any, points: Sequence[SweepPoint], **look: Any) -> None:
    axes.plot([entry.p99_ms for entry in points], [entry.samples_per_s for entry in points], linestyle="none", **look)


def _scale(axes: Any, points: Sequence[SweepPoint], slo_p99_ms: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    across = [entry.p99_ms for entry in points] + ([slo_p99_ms] if slo_p99_ms is not None else [])
    if max(across) > _LOG_FROM * min(across):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(across) / 1.4, max(across) * 1.25)
    else:
        axes.set_xlim(0, max(across) * 1.1)
    axes.set_ylim(0, max(entry.samples_per_s for entry in points) * 1.15)


def _draw_front(axes: Any, front: Sequence[SweepPoint]) -> None:
    if not front:
        return
    axes.step(
        [entry.p99_ms for entry in front],
        [entry.samples_per_s for entry in front],
        where="post",
        color=_SOFT,
        linewidth=1.2,
        zorder=1,
        label="Pareto front",
    )
    # up and to the left of a point of the front there is no other point; labels that come close to the last one go on
    last: tuple[float, float] | None = None
    for number, entry in enumerate(front, start=1):
        x, y = axes.transData.transform((entry.p99_ms, entry.samples_per_s))
        reach = 12.0
        while last is not None and abs(x - reach - last[0]) < 16 and abs(y + reach - last[1]) < 16:
            reach += 12
        last = (x - reach, y + reach)
        axes.annotate(
            str(number),
            (entry.p99_ms, entry.samples_per_s),
            xytext=(-reach, reach),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold",
            color=_INK,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": _SOFT, "linewidth": 0.7} if reach > 12 else None,
        )


def _draw_key(key: Any, front: Sequence[SweepPoint]) -> None:
    key.axis("off")
    key.set_xlim(0, 1)
    key.set_ylim(_KEY_ROWS, 0)
    key.text(0, 0.2, "On the front", fontsize=9, fontweight="bold", color=_INK, va="center")
    if not front:
        key.text(0, 1.2, "nothing: no load was stable", fontsize=8, color=_SOFT, va="center")
    left_out = max(0, len(front) - (_KEY_ROWS - 1))
    for row, entry in enumerate(front[left_out:], start=1):
        place = row + 0.2
        key.text(0, place, str(left_out + row), fontsize=8.5, fontweight="bold", color=_INK, va="center")
        key.text(0.06, place - 0.2, str(entry.candidate), fontsize=8, color=_INK, va="center")
        key.text(
            0.06,
            place + 0.22,
            f"concurrency {entry.concurrency}: {entry.samples_per_s:.1f} samples/s, p99 {entry.p99_ms:.1f} ms",
            fontsize=7.5,
            color=_SOFT,
            va="center",
        )
