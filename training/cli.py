"""``python -m training``: from images to a float, PTQ or QAT checkpoint, and from there to Q/DQ ONNX.

The commands parse options, call the functions of the same names and print. torch is imported inside them, so that
``--help`` answers at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.arguments import open_both, open_data, schedule_from
from training.console import Display, log_to_stderr, print_facts
from training.options import (
    AsJson,
    BatchSize,
    CalibrationMethod,
    CheckpointPath,
    Data,
    Epochs,
    Flip,
    ImageSize,
    LearningRate,
    LedgerFile,
    MaxSteps,
    Model,
    Output,
    Resume,
    ScoredSplit,
    ScoredStage,
    Seed,
    Shift,
    SplitSeed,
)
from trtdeploy.cli.console import door
from trtdeploy.errors import UsageError

if TYPE_CHECKING:
    from training.checkpoint import Checkpoint, SavedCheckpoint
    from trtdeploy.datasets import Dataset

app = typer.Typer(
    name="training",
    help="Train, quantize and export image classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def fit(
    output: Output,
    data: Data = "digits",
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="Float checkpoint to start from.")] = None,
    model: Model = None,
    image_size: ImageSize = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    shift: Shift = None,
    flip: Flip = False,
    seed: Seed = 0,
    split_seed: SplitSeed = None,
    resume: Resume = False,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Train a float network and keep the epoch that scores best on dev."""
    with door(), Display() as display:
        from training.fit import default_schedule
        from training.fit import fit as run

        _check_suffix(output, ".safetensors")
        start, dataset, split_seed = open_data(
            data, checkpoint=checkpoint, model=model, image_size=image_size, split_seed=split_seed
        )
        with dataset:
            saved = run(
                dataset,
                output,
                schedule=schedule_from(
                    default_schedule(dataset), epochs, max_steps, batch_size, learning_rate, shift, flip, seed
                ),
                model=model,
                image_size=image_size,
                start=start,
                split_seed=split_seed,
                resume=resume,
                observer=display,
            )
            _report(saved, dataset, "fit", ledger, display, as_json=as_json)


@app.command()
def calibrate(
    checkpoint: CheckpointPath,
    output: Output,
    data: Data = "digits",
    method: Annotated[
        CalibrationMethod, typer.Option("--method", help="Range of activations: largest |x|, or a percentile of |x|.")
    ] = CalibrationMethod.percentile,
    percentile: Annotated[float, typer.Option("--percentile", help="Percent of all |x| inside the range.")] = 99.99,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Use so many of the calibration images (default: all).")
    ] = None,
    model: Model = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    split_seed: SplitSeed = None,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a float checkpoint to INT8 without training (PTQ)."""
    with door(), Display() as display:
        from training.calibrate import calibrate as run
        from training.recording import has_stage

        _check_suffix(output, ".safetensors")
        start, dataset, split_seed = open_both(
            data, checkpoint, model=model, image_size=image_size, split_seed=split_seed
        )
        with dataset:
            # Before calibration, which changes the network: this is how somebody else's checkpoint gets its stage.
            if ledger is not None and start.facts.kind == "float" and not has_stage(ledger, "float"):
                _score_and_record(start, dataset, "float", ledger, "training calibrate", display)
            saved = run(
                dataset,
                start,
                output,
                method=method.value,
                percentile=percentile,
                images=images,
                seed=seed,
                split_seed=split_seed,
                progress=display.images("calibrating"),
            )
            _report(saved, dataset, "calibrate", ledger, display, as_json=as_json)


@app.command()
def qat(
    checkpoint: CheckpointPath,
    output: Output,
    data: Data = "digits",
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    shift: Shift = None,
    flip: Flip = False,
    seed: Seed = 0,
    split_seed: SplitSeed = None,
    resume: Resume = False,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a calibrated checkpoint with quantization in the loop (QAT)."""
    with door(), Display() as display:
        from training.qat import default_schedule
        from training.qat import qat as run

        _check_suffix(output, ".safetensors")
        start, dataset, split_seed = open_both(data, checkpoint, split_seed=split_seed)
        with dataset:
            # Steps alone mean as many passes as they take.
            saved = run(
                dataset,
                start,
                output,
                schedule=schedule_from(
                    default_schedule(dataset),
                    epochs or max_steps,
                    max_steps,
                    batch_size,
                    learning_rate,
                    shift,
                    flip,
                    seed,
                ),
                split_seed=split_seed,
                resume=resume,
                observer=display,
            )
            _report(saved, dataset, "qat", ledger, display, as_json=as_json)


@app.command()
def export(
    checkpoint: CheckpointPath,
    output: Output,
    data: Data = "digits",
    opset: Annotated[int, typer.Option("--opset", help="Version of the ONNX operators, 17 to 20.")] = 17,
    model: Model = None,
    image_size: ImageSize = None,
    split_seed: SplitSeed = None,
    ledger: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as ONNX, with Q/DQ where it is quantized, after comparing its answers with torch's."""
    with door(), Display() as display:
        from training.export import export as run
        from training.export import onnx_predictor
        from training.recording import record, score_split

        _check_suffix(output, ".onnx")
        start, dataset, _ = open_both(data, checkpoint, model=model, image_size=image_size, split_seed=split_seed)
        with dataset:
            exported = run(start, output, dataset, opset=opset)
            facts = exported.as_json()
            text = (
                f"{output}: opset {opset}, {exported.quantize_nodes} Q and {exported.dequantize_nodes} DQ nodes; "
                f"{exported.parity.disagreements} of {exported.parity.images} answers differ from torch's"
            )
            if ledger is not None:
                predict = onnx_predictor(output.read_bytes())
                evaluation = score_split(predict, start.facts, dataset, progress=display.images("scoring"))
                facts["ledger"] = record(
                    ledger,
                    "onnx",
                    evaluation,
                    predict=predict,
                    facts=start.facts,
                    dataset=dataset,
                    file=output,
                    sha256=exported.sha256,
                    command="training export",
                )
                text += f"; test top-1 {evaluation.outputs.top1.format()}%"
            display.finish()
            print_facts(facts, text, as_json=as_json)


@app.command()
def evaluate(
    checkpoint: CheckpointPath,
    data: Data = "digits",
    split: Annotated[ScoredSplit, typer.Option("--split", help="Which images to score.")] = ScoredSplit.test,
    stage: Annotated[
        ScoredStage | None, typer.Option("--stage", help="Record under this stage (default: what the checkpoint is).")
    ] = None,
    model: Model = None,
    image_size: ImageSize = None,
    split_seed: SplitSeed = None,
    ledger: Annotated[Path | None, typer.Option("--ledger", help="Record in this accuracy ledger.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint: top-1 in percent with its 95% interval."""
    with door(), Display() as display:
        from training.predict import predictor
        from training.recording import score_split

        if ledger is not None and split is not ScoredSplit.test:
            raise UsageError(f"--ledger compares stages on the test split; --split {split.value} cannot be recorded.")
        start, dataset, _ = open_both(data, checkpoint, model=model, image_size=image_size, split_seed=split_seed)
        name = stage.value if stage else start.facts.kind
        with dataset:
            if ledger is not None:
                facts = _score_and_record(start, dataset, name, ledger, "training evaluate", display)
            else:
                evaluation = score_split(
                    predictor(start.model),
                    start.facts,
                    dataset,
                    split=split.value,
                    progress=display.images("scoring"),
                )
                top1 = evaluation.outputs.top1
                facts = {
                    "n": len(evaluation.outputs.ids),
                    "top1": top1.model_dump(),
                    "seconds": round(evaluation.seconds, 3),
                }
            interval = facts["top1"]
            text = (
                f"{split.value} top-1 {interval['value']:.2f}% [{interval['low']:.2f}, {interval['high']:.2f}] "
                f"on {facts['n']} images"
            )
            display.finish()
            print_facts(
                {"checkpoint": str(checkpoint), "kind": start.facts.kind, "split": split.value, **facts},
                text,
                as_json=as_json,
            )


def main() -> None:
    """Run the command line."""
    # Read by torch's OpenMP runtime when it is loaded. By default its workers spin for milliseconds between two
    # operations; on a machine whose cores are shared they then keep each other from running, and training gets
    # many times slower. This bounds the spinning to microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    log_to_stderr()
    app()


def _check_suffix(output: Path, suffix: str) -> None:
    if output.suffix != suffix:
        raise UsageError(f"--output {output} must end in {suffix}.")


def _report(
    saved: SavedCheckpoint, dataset: Dataset, command: str, ledger: Path | None, display: Display, *, as_json: bool
) -> None:
    """Print what was written and, with a ledger, score it on the test split from the file."""
    facts = saved.as_json()
    dev = saved.facts.dev
    text = f"{saved.path}: {saved.facts.kind}"
    if dev is not None:
        text += f", dev top-1 {dev.top1:.2f}% on {dev.n} images, {saved.seconds:.1f} s"
    if ledger is not None:
        from training.checkpoint import load_checkpoint

        start = load_checkpoint(saved.path)
        facts["ledger"] = _score_and_record(start, dataset, saved.facts.kind, ledger, f"training {command}", display)
        top1 = facts["ledger"]["top1"]
        text += f"; test top-1 {top1['value']:.2f}% [{top1['low']:.2f}, {top1['high']:.2f}]"
    display.finish()
    print_facts(facts, text, as_json=as_json)


def _score_and_record(
    checkpoint: Checkpoint, dataset: Dataset, stage: Any, ledger: Path, command: str, display: Display
) -> dict[str, Any]:
    from training.predict import predictor
    from training.recording import record, score_split

    predict = predictor(checkpoint.model)
    evaluation = score_split(predict, checkpoint.facts, dataset, progress=display.images(f"scoring {stage}"))
    return record(
        ledger,
        stage,
        evaluation,
        predict=predict,
        facts=checkpoint.facts,
        dataset=dataset,
        file=checkpoint.path,
        sha256=checkpoint.sha256,
        command=command,
    )
