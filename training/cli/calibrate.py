"""``trtdeploy train calibrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from training.cli.arguments import open_both
from training.cli.console import Display
from training.cli.options import (
    AsJson,
    CalibrationMethod,
    CheckpointPath,
    Data,
    Device,
    DeviceName,
    ImageSize,
    LedgerFile,
    Model,
    Output,
    Seed,
    Skip,
    SplitSeed,
    Target,
    TargetName,
    Toolkit,
    ToolkitName,
    TransposedWeights,
    TransposedWeightsName,
)
from training.cli.reporting import check_output, report, score_and_record
from trtdeploy.cli.console import Output as Stdout
from trtdeploy.cli.console import door
from trtdeploy.errors import UsageError

if TYPE_CHECKING:
    from training.checkpoints.checkpoint import CalibrationFacts


def calibrate(
    checkpoint: CheckpointPath,
    output: Output,
    data: Data = "digits",
    method: Annotated[
        CalibrationMethod,
        typer.Option("--method", help="How the ranges of activations are found; all: the best of all on dev."),
    ] = CalibrationMethod.relative_mse,
    percentile: Annotated[
        float | None,
        typer.Option("--percentile", help="Percent of all |x| inside the range (99.99); for percentile, and for all."),
    ] = None,
    skip: Skip = None,
    bias_correction: Annotated[
        bool,
        typer.Option("--bias-correction", help="Let the biases take back what quantization shifts on average."),
    ] = False,
    target: Target = TargetName.tensorrt,
    toolkit: Toolkit = ToolkitName.pytorch_quantization,
    transposed_weights: TransposedWeights = TransposedWeightsName.per_tensor,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Use so many of the calibration images (default: all).")
    ] = None,
    model: Model = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    split_seed: SplitSeed = None,
    device: Device = DeviceName.auto,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a float checkpoint to INT8 without training (PTQ)."""
    with door(), Display() as display:
        from training.loop.optimization import execution_for
        from training.ptq.calibrate import calibrate as run
        from training.quantization import QuantizationSpec
        from training.recording import has_stage

        check_output(output, ".safetensors", checkpoint, ledger=ledger)
        if percentile is not None and method not in (CalibrationMethod.percentile, CalibrationMethod.all):
            raise UsageError(
                f"--percentile {percentile:g} means nothing to --method {method.value}.",
                hint="Add --method percentile, or leave it out.",
            )
        place = execution_for(device.value).device
        start, dataset, split_seed = open_both(
            data, checkpoint, model=model, image_size=image_size, split_seed=split_seed
        )
        with dataset:
            # Before calibration, which changes the network: this is how somebody else's checkpoint gets its stage.
            if ledger is not None and start.facts.kind == "float" and not has_stage(ledger, "float"):
                score_and_record(start, dataset, "float", ledger, "training calibrate", display, device=place)
            saved = run(
                dataset,
                start,
                output,
                spec=QuantizationSpec(
                    target=target.value,
                    toolkit=toolkit.value,
                    skip=tuple(skip or ()),
                    transposed_weights=transposed_weights.value,
                ),
                method=method.value,
                percentile=99.99 if percentile is None else percentile,
                images=images,
                seed=seed,
                split_seed=split_seed,
                bias_correction=bias_correction,
                device=place,
                progress=display.images("calibrating"),
            )
            report(saved, dataset, "calibrate", ledger, display, device=place, as_json=as_json)
            if not as_json and saved.facts.calibration is not None:
                _print_details(saved.facts.calibration)


def _print_details(facts: CalibrationFacts) -> None:
    correction = facts.bias_correction
    if correction is not None:
        left_out = f"; left out: {', '.join(correction.left_out)}" if correction.left_out else ""
        typer.echo(
            f"bias correction: {correction.corrected} layers on {correction.images} images, dev top-1 before "
            f"{correction.dev_before.top1:.2f}%{left_out}"
        )
    if facts.candidates:
        _print_candidates(facts)


def _print_candidates(facts: CalibrationFacts) -> None:
    from rich.table import Table

    table = Table("method", "dev top-1 %", "dev loss", "", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    for tried in facts.candidates:
        name = tried.method if tried.percentile is None else f"{tried.method} {tried.percentile:g}"
        chosen = (tried.method, tried.percentile) == (facts.method, facts.percentile)
        table.add_row(name, f"{tried.dev.top1:.2f}", f"{tried.dev.loss:.4f}", "chosen" if chosen else "")
    Stdout().print(table)
