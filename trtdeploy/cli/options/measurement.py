"""What a load sends and how long it is looked at: the options of ``load``, with and without ``--sweep``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from trtdeploy.cli.console import finite_seconds

if TYPE_CHECKING:
    from trtdeploy.load import WindowOptions

_PANEL = "Measurement"
Window = Annotated[
    float,
    typer.Option(
        "--window", min=0.05, max=600, callback=finite_seconds, help="Seconds per window.", rich_help_panel=_PANEL
    ),
]
MaxWindows = Annotated[
    int,
    typer.Option(
        "--max-windows",
        min=3,
        max=1000,
        help="Windows per load until it counts as not stable.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class MeasurementFlags:
    """For ``with_option_groups``."""

    data: Annotated[
        str | None,
        typer.Option("--data", help="Take inputs from this dataset (default: random, seeded).", rich_help_panel=_PANEL),
    ] = None
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Samples per request.", rich_help_panel=_PANEL)
    ] = 1
    warm_up: Annotated[
        float,
        typer.Option(
            "--warm-up",
            min=0,
            max=600,
            callback=finite_seconds,
            help="Seconds before it counts.",
            rich_help_panel=_PANEL,
        ),
    ] = 1.0
    window: Window = 2.0
    max_windows: MaxWindows = 10
    stability_percent: Annotated[
        float,
        typer.Option(
            "--stability-percent",
            min=0.1,
            max=10000,
            help="How far the last three windows may differ.",
            rich_help_panel=_PANEL,
        ),
    ] = 10.0
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.001,
            callback=finite_seconds,
            help="Seconds that one request may take.",
            rich_help_panel=_PANEL,
        ),
    ] = 30.0
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of random inputs and arrival times.", rich_help_panel=_PANEL)
    ] = 0

    def windows(self) -> WindowOptions:
        """Return how long each load is looked at."""
        from trtdeploy.load import WindowOptions

        return WindowOptions(
            warm_up_s=self.warm_up,
            window_s=self.window,
            max_windows=self.max_windows,
            stability_percent=self.stability_percent,
        )


@dataclass(frozen=True)
class SweepMeasurementFlags(MeasurementFlags):
    """The same with shorter looks: a sweep has many."""

    window: Window = 1.0
    max_windows: MaxWindows = 6
