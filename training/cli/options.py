"""The options that the commands share, with their help."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class CalibrationMethod(str, Enum):
    """How the ranges of activations are found."""

    max = "max"
    percentile = "percentile"
    mse = "mse"
    relative_mse = "relative-mse"
    entropy = "entropy"
    all = "all"


class TargetName(str, Enum):
    """What the quantized network is to run on."""

    tensorrt = "tensorrt"
    onnxruntime = "onnxruntime"


class ToolkitName(str, Enum):
    """Whose quantizers are put in."""

    pytorch_quantization = "pytorch-quantization"
    modelopt = "modelopt"


class TransposedWeightsName(str, Enum):
    """How the weights of transposed convolutions are quantized."""

    per_tensor = "per-tensor"
    per_channel = "per-channel"


class ScoredStage(str, Enum):
    """The ledger's stages that are checkpoints."""

    float = "float"
    ptq = "ptq"
    qat = "qat"


class RangeTraining(str, Enum):
    """What becomes of the ranges during QAT."""

    frozen = "frozen"
    learned = "learned"


class DeviceName(str, Enum):
    """Where the network runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ScoredSplit(str, Enum):
    """The splits of a dataset."""

    train = "train"
    calibration = "calibration"
    dev = "dev"
    test = "test"


CheckpointPath = Annotated[Path, typer.Argument(help="A .safetensors, .pt or .pth checkpoint.")]
Data = Annotated[str, typer.Option("--data", help="digits, or a folder or archive of <split>/<class>/*.jpg or *.png.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="efficientnet_b0 (default), or module:factory, called as factory(num_classes)."),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", min=1, help="Side of the square input in pixels (default: 32 for digits, else 64)."),
]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the training images.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", min=1, help="Stop after so many steps.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=2, help="Images per step.")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate.")]
Shift = Annotated[
    int | None, typer.Option("--shift", min=0, help="Shift training images by up to so many pixels at random.")
]
Flip = Annotated[bool, typer.Option("--flip", help="Mirror half of the training images; not for digits or letters.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn at random.")]
SplitSeed = Annotated[
    int | None,
    typer.Option("--split-seed", min=0, help="Of the splits that are drawn (default: the checkpoint's, else 0)."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run that was to write --output.")]
LedgerFile = Annotated[
    Path | None, typer.Option("--ledger", help="Score the test split too and record it in this accuracy ledger.")
]
Target = Annotated[TargetName, typer.Option("--target", help="Whose rules say where the quantizers go.")]
Toolkit = Annotated[ToolkitName, typer.Option("--toolkit", help="Whose quantizers are put in.")]
TransposedWeights = Annotated[
    TransposedWeightsName,
    typer.Option("--transposed-weights", help="Scales of a transposed convolution's weight: one, or one per channel."),
]
Skip = Annotated[
    list[str] | None,
    typer.Option("--skip", help="Leave layers of such names in float, for example 'features.0.*'; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object of facts on stdout.")]
Ranges = Annotated[
    RangeTraining,
    typer.Option("--ranges", help="Learn the ranges with the weights, or leave them as they are."),
]
Teacher = Annotated[
    Path | None, typer.Option("--teacher", help="Float checkpoint whose answers are learned too (distillation).")
]
TeacherWeight = Annotated[
    float | None,
    typer.Option("--teacher-weight", help="Share of the teacher in the loss, above 0 and at most 1 (default: 0.5)."),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Divides the logits of teacher and student (default: 2).")
]
DistillOnly = Annotated[
    bool, typer.Option("--distill-only", help="Learn from the teacher alone; labels are not read, and need not exist.")
]
Device = Annotated[
    DeviceName, typer.Option("--device", help="Where the network runs; auto takes a GPU if there is one.")
]
Amp = Annotated[
    bool, typer.Option("--amp", help="Compute in bfloat16 where the device has it; ranges and codes stay in float32.")
]
WorkerTimeout = Annotated[
    float,
    typer.Option("--worker-timeout", min=1, help="Seconds that a process started by torchrun waits for the others."),
]
