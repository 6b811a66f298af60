"""The whole road with one call: train, calibrate, fine-tune, export, build, package, serve, validate.

Training happens in ``trtdeploy train`` commands, as a user would type them: torch never enters this process.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtdeploy.building.build import BuildConfig, build
from trtdeploy.data import open_dataset
from trtdeploy.engine import Engine
from trtdeploy.errors import RuntimeUnavailableError, TrtDeployError, UsageError
from trtdeploy.ledger import Ledger, Stage, StageRecord
from trtdeploy.module_command import module_command
from trtdeploy.tensors import ShapeRange
from trtdeploy.triton.client import connect
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer
from trtdeploy.triton.targets.served_classifier import ServedTarget
from trtdeploy.validation import PlanTarget, ValidationOptions, ValidationReport, validate

MODEL_NAME = "quickstart"
_MAX_BATCH = 32
_NEEDED = {
    "torch": "training",
    "pytorch_quantization": "training",
    "sklearn": "training",
    "safetensors": "training",
    "tritonclient": "triton",
}


@dataclass(frozen=True)
class Artifacts:
    """Where everything is written, all below one folder."""

    folder: Path

    @property
    def float_checkpoint(self) -> Path:
        """The trained network."""
        return self.folder / "float.safetensors"

    @property
    def ptq_checkpoint(self) -> Path:
        """Calibrated."""
        return self.folder / "ptq.safetensors"

    @property
    def qat_checkpoint(self) -> Path:
        """Fine-tuned with quantization in the loop."""
        return self.folder / "qat.safetensors"

    @property
    def onnx(self) -> Path:
        """The network with Q/DQ."""
        return self.folder / "model.onnx"

    @property
    def plan(self) -> Path:
        """Built for this machine."""
        return self.folder / "model.plan"

    @property
    def timing_cache(self) -> Path:
        """What the build measured."""
        return self.folder / "build.timing"

    @property
    def repository(self) -> Path:
        """Triton's model repository."""
        return self.folder / "model_repository"

    @property
    def server_log(self) -> Path:
        """What tritonserver printed."""
        return self.folder / "tritonserver.log"

    @property
    def ledger(self) -> Path:
        """Accuracy at every stage."""
        return self.folder / "ledger.json"

    def clear(self) -> None:
        """Remove what an earlier run left, and nothing else.

        Raises:
            UsageError: The folder holds something, but no earlier run of this command.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is not a folder.")
        marker = self.folder / ".trtdeploy-quickstart"
        if self.folder.is_dir() and any(self.folder.iterdir()) and not marker.exists():
            raise UsageError(
                f"{self.folder} is not empty and not from an earlier quickstart.", hint="Choose another --output."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        shutil.rmtree(self.repository, ignore_errors=True)
        for pattern in ("*.safetensors", "*.resume.pt", "*.jsonl", "model.*", "ledger.*", "tritonserver.log"):
            for path in self.folder.glob(pattern):
                path.unlink()


@dataclass(frozen=True)
class QuickstartResult:
    """What a run leaves.

    Attributes:
        artifacts: Where it was written.
        stages: The ledger's stages, in order.
        validation: What the served model was measured at.
    """

    artifacts: Artifacts
    stages: Mapping[Stage, StageRecord]
    validation: ValidationReport


@dataclass(frozen=True)
class Display:
    """How a run is shown.

    Attributes:
        step: Called with the title of the step that begins and the command that does the same.
        progress: Called with (label, done, total) inside of a step.
    """

    step: Callable[[str, str], None]
    progress: Callable[[str, int, int], None]


def quickstart(
    output: str | Path,
    display: Display,
    *,
    data: str = "digits",
    checkpoint: Path | None = None,
    model: str | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    qat_steps: int | None = None,
    seed: int = 0,
    tritonserver: Path | None = None,
) -> QuickstartResult:
    """Take a dataset to a validated INT8 service on this machine.

    Args:
        output: Folder for everything that is written; an earlier run's files there are replaced.
        display: How the run is shown.
        data: ``digits``, or a folder or archive of ``<split>/<class>/*.jpg``.
        checkpoint: A float checkpoint to start from; without one, a network is trained.
        model: ``efficientnet_b0`` or ``module:factory``.
        image_size: Side of the square input in pixels.
        epochs: Of the float training.
        qat_steps: Steps of the fine-tuning.
        seed: Of everything that is drawn at random.
        tritonserver: The server's executable.

    Raises:
        RuntimeUnavailableError: A package is missing, or there is no tritonserver.
        TrtDeployError: A step failed; what it printed says why.
    """
    _check_installed()
    installation = find_tritonserver(tritonserver)
    artifacts = Artifacts(Path(output))
    if checkpoint is not None and checkpoint.resolve().parent == artifacts.folder.resolve():
        raise UsageError(f"{checkpoint} lies in --output {artifacts.folder}, which is cleared first.")
    artifacts.clear()
    start = checkpoint if checkpoint is not None else artifacts.float_checkpoint
    common = ["--data", data, "--ledger", str(artifacts.ledger)]
    network = _flags(model=model, image_size=image_size)
    if checkpoint is None:
        fit = ["fit", "-o", str(start), *common, *network, *_flags(epochs=epochs, seed=seed)]
        _run_training("Train the float network", fit, display)
        network = []  # the checkpoint knows it from here on
    calibrate = ["calibrate", str(start), "-o", str(artifacts.ptq_checkpoint), "--method", "max", *common, *network]
    _run_training("Calibrate: INT8 without training (PTQ, max)", [*calibrate, *_flags(seed=seed)], display)
    qat = ["qat", str(artifacts.ptq_checkpoint), "-o", str(artifacts.qat_checkpoint), *common]
    _run_training(
        "Fine-tune with quantization in the loop (QAT)", [*qat, *_flags(max_steps=qat_steps, seed=seed)], display
    )
    export = ["export", str(artifacts.qat_checkpoint), "-o", str(artifacts.onnx), *common]
    _run_training("Export to ONNX with Q/DQ", export, display)
    _build_and_check(artifacts, data, display)
    display.step(
        "Package for Triton",
        f"trtdeploy package {artifacts.plan} --name {MODEL_NAME} --repository {artifacts.repository}",
    )
    package(artifacts.plan, artifacts.repository, MODEL_NAME)
    display.step("Serve with Triton", f"trtdeploy serve {artifacts.repository}")
    with artifacts.server_log.open("w") as log:
        server = TritonServer(
            artifacts.repository,
            installation,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            log=lambda line: print(line, file=log, flush=True),
        )
        with server, connect(server.grpc_url) as client, open_dataset(data) as dataset:
            display.step(
                "Validate what is served, over gRPC",
                f"trtdeploy validate --url {server.grpc_url} --model {MODEL_NAME} --data {data} "
                f"--ledger {artifacts.ledger}",
            )
            report = validate(
                ServedTarget(client, MODEL_NAME),
                dataset,
                ValidationOptions(),
                ledger=Ledger(artifacts.ledger),
                progress=lambda done, total: display.progress("validating", done, total),
            )
    return QuickstartResult(artifacts, Ledger(artifacts.ledger).stages, report)


def _build_and_check(artifacts: Artifacts, data: str, display: Display) -> None:
    """Build the plan and record what it answers in this process."""
    height, width = _image_shape(artifacts.onnx)
    shapes = ShapeRange(min=(1, 3, height, width), opt=(1, 3, height, width), max=(_MAX_BATCH, 3, height, width))
    display.step(
        "Build the plan",
        f"trtdeploy build {artifacts.onnx} -o {artifacts.plan} --shape input={shapes} "
        f"--timing-cache {artifacts.timing_cache} --ledger {artifacts.ledger}",
    )
    build(
        artifacts.onnx,
        artifacts.plan,
        BuildConfig(profiles=({"input": shapes},), timing_cache=artifacts.timing_cache),
        ledger=artifacts.ledger,
        progress=display.progress,
    )
    display.step(
        "Validate the plan in this process",
        f"trtdeploy validate --plan {artifacts.plan} --data {data} --ledger {artifacts.ledger}",
    )
    with Engine.load(artifacts.plan, contexts=2) as engine, open_dataset(data) as dataset:
        validate(
            PlanTarget(engine, artifacts.plan),
            dataset,
            ValidationOptions(concurrency=2),
            ledger=Ledger(artifacts.ledger),
            progress=lambda done, total: display.progress("evaluating", done, total),
        )


def _image_shape(onnx: Path) -> tuple[int, int]:
    from trtdeploy.onnxgraph.reading.source import load_source

    preprocessing = load_source(onnx).preprocessing
    if preprocessing is None:
        raise UsageError(f"{onnx} carries no preprocessing.")
    return preprocessing.sample_shape[1], preprocessing.sample_shape[2]


def _run_training(title: str, arguments: Sequence[str], display: Display) -> None:
    """Run one training command; its progress goes where ours goes.

    Raises:
        TrtDeployError: It failed; it has printed why.
    """
    display.step(title, shlex.join(["trtdeploy", "train", *arguments]))
    # its one line of facts goes to stderr like all progress: stdout is for the table
    process = subprocess.Popen(module_command("trtdeploy", "train", *arguments), stdout=sys.stderr)
    try:
        code = process.wait()
    except BaseException:
        # Ctrl-C in a terminal reaches the child as well; a signal to this process alone does not
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code != 0:
        failure = TrtDeployError(f"The step {title!r} failed with exit code {code}; its message is above.")
        failure.exit_code = code if code in (1, 2, 3) else 2
        raise failure


def _flags(**options: object) -> list[str]:
    """Return ``--image-size 64`` for ``image_size=64``; None is left out."""
    return [
        part
        for name, value in options.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def _check_installed() -> None:
    missing = {extra for module, extra in _NEEDED.items() if importlib.util.find_spec(module) is None}
    if missing:
        raise RuntimeUnavailableError(
            "The quickstart trains, serves and validates; the packages for that are not all installed.",
            hint="pip install 'trtdeploy[training,triton,server]'",
        )
