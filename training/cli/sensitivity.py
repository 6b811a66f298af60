"""``trtdeploy train sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.cli.arguments import open_both
from training.cli.console import Display, print_facts
from training.cli.options import (
    AsJson,
    CheckpointPath,
    Data,
    Device,
    DeviceName,
    ImageSize,
    Model,
    Seed,
    Skip,
    SplitSeed,
    Target,
    Toolkit,
)
from training.cli.reporting import check_output
from trtdeploy.cli.console import door
from trtdeploy.errors import UsageError


def sensitivity(
    checkpoint: CheckpointPath,
    data: Data = "digits",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON to write (default: CHECKPOINT.sensitivity.json).")
    ] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Bar chart to write, .png or .svg.")] = None,
    target: Target | None = None,
    toolkit: Toolkit | None = None,
    skip: Skip = None,
    model: Model = None,
    image_size: ImageSize = None,
    images: Annotated[int | None, typer.Option("--images", min=1, help="Measure on so many dev images only.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many layers to print.")] = 10,
    seed: Seed = 0,
    split_seed: SplitSeed = None,
    device: Device = DeviceName.auto,
    as_json: AsJson = False,
) -> None:
    """Find the layers that cost accuracy: each quantized alone, and each alone in float. A killed run goes on.

    A float checkpoint is calibrated first, with the default method, as --target, --toolkit and --skip say; the result
    is kept beside the output. A quantized checkpoint is measured as it is.
    """
    with door(), Display() as display:
        from training.loop.optimization import execution_for
        from training.sensitivity import draw_chart, measure_sensitivity, quantized_start
        from training.sensitivity.chart import FORMATS

        if chart is not None and chart.suffix not in FORMATS:
            raise UsageError(f"--chart {chart} must end in {' or '.join(FORMATS)}.")
        output = output or checkpoint.with_suffix(".sensitivity.json")
        check_output(output, ".json")
        place = execution_for(device.value).device
        start, dataset, split_seed = open_both(
            data, checkpoint, model=model, image_size=image_size, split_seed=split_seed
        )
        with dataset:
            network = quantized_start(
                start,
                dataset,
                output.with_suffix(".ptq.safetensors"),
                target=target.value if target else None,
                toolkit=toolkit.value if toolkit else None,
                skip=skip or (),
                split_seed=split_seed,
                device=place,
                progress=display.images("calibrating"),
            )
            found = measure_sensitivity(
                network,
                dataset,
                output,
                images=images,
                seed=seed,
                device=place,
                progress=display.images("layers"),
            )
        if chart is not None:
            draw_chart(found, chart)
        lines = [
            f"float {found.float_top1.format()}%, quantized {found.quantized.top1.format()}% on {found.images} images",
            f"{'only this quantized:':>24} {'KL':>9} {'SQNR dB':>8} {'top-1':>7}   {'only this float: top-1':>22}  "
            "layer",
        ]
        for row in found.layers[:top]:
            alone, left_out = row.only_quantized, row.only_float
            ratio = "inf" if alone.sqnr_db is None else f"{alone.sqnr_db:.1f}"
            lines.append(
                f"{'':24} {alone.kl:9.2e} {ratio:>8} {alone.difference.difference.value:+7.2f}   "
                f"{left_out.difference.difference.value:+22.2f}  {row.title}"
            )
        lines += [f"  in float: {layer.name} ({layer.reason})" for layer in found.in_float]
        display.finish()
        facts = {"output": str(output), "checkpoint": str(network.path), **found.model_dump(mode="json")}
        print_facts(facts, "\n".join(lines), as_json=as_json)
