"""The bar chart of a sensitivity measurement."""

from __future__ import annotations

import io
from pathlib import Path

from training.sensitivity.measure import Sensitivity
from trtdeploy.errors import UsageError
from trtdeploy.files import atomic_write

_ROW_INCHES = 0.19
_NAME_CHARACTERS = 48
_ONE, _OTHER = "#0072B2", "#E69F00"  # blue and orange, which the colour-blind tell apart (Okabe and Ito)
FORMATS = (".png", ".svg")


def draw_chart(found: Sensitivity, path: Path) -> None:
    """Write one row per layer, worst first: what it costs alone, and what leaving it in float brings.

    Raises:
        UsageError: The file is neither ``.png`` nor ``.svg``.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"--chart {path} must end in {' or '.join(FORMATS)}.")
    from matplotlib.figure import Figure

    rows = found.layers
    height = 1.5 + _ROW_INCHES * len(rows)
    figure = Figure(figsize=(11, height), layout="constrained")
    divergence, accuracy = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = list(range(len(rows)))
    divergence.barh(places, [row.only_quantized.kl for row in rows], height=0.7, color=_ONE)
    divergence.set_yticks(places, [_short(row.title) for row in rows], fontsize=7)
    divergence.set_ylim(len(rows) - 0.4, -0.6)  # worst at the top
    divergence.set_xlabel("KL divergence from float, only this quantized (nats)", fontsize=8)
    for shift, colour, label, changes in (
        (-0.18, _ONE, "only this quantized, against float", [row.only_quantized.difference for row in rows]),
        (0.18, _OTHER, "only this in float, against all quantized", [row.only_float.difference for row in rows]),
    ):
        intervals = [change.difference for change in changes]
        accuracy.errorbar(
            [interval.value for interval in intervals],
            [place + shift for place in places],
            xerr=(
                [interval.value - interval.low for interval in intervals],
                [interval.high - interval.value for interval in intervals],
            ),
            fmt="o",
            markersize=2.5,
            elinewidth=0.9,
            color=colour,
            label=label,
        )
    accuracy.axvline(0, color="0.5", linewidth=0.8)
    accuracy.set_xlabel("change of top-1 (points, 95% interval)", fontsize=8)
    figure.legend(*accuracy.get_legend_handles_labels(), fontsize=7, loc="outside lower right", ncols=2)
    for axes in (divergence, accuracy):
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Float {found.float_top1.value:.2f}%, all quantized {found.quantized.top1.value:.2f}% "
        f"on {found.images} {found.split} images",
        fontsize=9,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=150)
    atomic_write(path, buffer.getvalue())


def _short(name: str) -> str:
    """Cut a long name in its middle: its end says the layer, its beginning the block."""
    if len(name) <= _NAME_CHARACTERS:
        return name
    half = (_NAME_CHARACTERS - 3) // 2
    return f"{name[:half]}...{name[-half:]}"
