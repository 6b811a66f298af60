"""``trtdeploy quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtdeploy.cli.console import Bars, door, print_json
from trtdeploy.cli.plans import AsJson
from trtdeploy.counting import counted

if TYPE_CHECKING:
    from trtdeploy.quantizing.closeness import WorstChannel


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(quantize)


def quantize(
    model: Annotated[Path, typer.Argument(dir_okay=False, help="A float ONNX model.")],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The ONNX file to write.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="digits, a folder or archive of <split>/<class>/*.jpg, or .npy / .npz files of model inputs.",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="Ranges of activations: max, percentile, mse, relative-mse, entropy, or auto: what holds best here.",
        ),
    ] = "auto",
    percentile: Annotated[
        float, typer.Option("--percentile", help="Percent of all |x| inside the range, for that method.")
    ] = 99.99,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Use so many of the calibration samples (default: all).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides which samples.")] = 0,
    split_seed: Annotated[int, typer.Option("--split-seed", min=0, help="Of the splits that are drawn.")] = 0,
    target: Annotated[
        str, typer.Option("--target", help="Whose placement rules: tensorrt or onnxruntime.")
    ] = "tensorrt",
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="PATTERN", help="Nodes that stay in float, as /features/0*; may be repeated."),
    ] = None,
    transposed_weights: Annotated[
        str,
        typer.Option(
            "--transposed-weights", help="Scales of a ConvTranspose's weight: per-tensor or per-channel (axis 1)."
        ),
    ] = "per-tensor",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples in memory at once.")] = 8,
    fixed: Annotated[
        list[str] | None,
        typer.Option(
            "--fixed",
            metavar="NAME=FILE|VALUE",
            help="An input that is the same for all samples: a .npy file or a number; may be repeated.",
        ),
    ] = None,
    preprocessing: Annotated[
        Path | None,
        typer.Option("--preprocessing", dir_okay=False, help="JSON of resize, crop, mean, std, ... for images."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a float ONNX model to INT8 with Q/DQ, without training (PTQ)."""
    with door(), Bars() as bars:
        from trtdeploy.data.preprocessing import Preprocessing
        from trtdeploy.quantizing import PtqOptions
        from trtdeploy.quantizing import quantize as run

        given: dict[str, Any] = {
            "method": method,
            "percentile": percentile,
            "images": images,
            "seed": seed,
            "split_seed": split_seed,
            "target": target,
            "skip": tuple(skip or ()),
            "transposed_weights": transposed_weights,
            "batch_size": batch,
            "fixed": tuple(fixed or ()),
        }
        done = run(
            model,
            output,
            data,
            PtqOptions.model_validate(given),
            preprocessing=Preprocessing.read(preprocessing) if preprocessing else None,
            progress=bars.show,
        )
        bars.finish()
        if as_json:
            print_json(done.as_json())
            return
        facts = done.calibration
        name = facts["method"] if facts["percentile"] is None else f"{facts['method']} {facts['percentile']:g}"
        if facts["candidates"]:
            scored = ", ".join(f"{method} {_db(score)}" for method, score in facts["candidates"].items())
            judges = ", ".join(facts["judged_by"])
            typer.echo(f"median SQNR of {judges} on held-out samples: {scored}")
        typer.echo(
            f"{output}: {done.quantized_layers} of {counted(done.layers, 'layer')} and "
            f"{counted(done.activations, 'activation')} in INT8; {name} over {counted(facts['images'], 'sample')}; "
            f"SQNR of the outputs {_db(done.output_sqnr_db)}{_worst(done.worst_channel)}"
            + (f" ({done.not_compared})" if done.not_compared else "")
        )
        for layer, reason in done.left_float.items():
            typer.echo(f"{layer} stays in float: {reason}")
        if done.one_scale:
            typer.echo(
                f"one scale for all output channels of {', '.join(done.one_scale)}: runtimes and tools disagree on the "
                "axis of a ConvTranspose's scales (--transposed-weights per-channel writes axis 1)"
            )
        if done.dev is not None:
            dev = done.dev
            typer.echo(
                f"dev top-1 on {dev.n} images: float {dev.float_top1.format()}%, INT8 {dev.int8_top1.format()}%, "
                f"same answer {dev.agreement:.2f}%"
            )


def _worst(channel: WorstChannel | None) -> str:
    return "" if channel is None else f", of the worst channel ({channel}) {_db(channel.sqnr_db)}"


def _db(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1f} dB"
