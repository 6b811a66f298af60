"""All rules, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtdeploy.triton.config.check.ensembles import ensemble_findings
from trtdeploy.triton.config.check.finding import Finding
from trtdeploy.triton.config.check.folder import folder_findings
from trtdeploy.triton.config.check.instances import instance_findings
from trtdeploy.triton.config.check.plans import plan_findings
from trtdeploy.triton.config.check.scheduling import scheduling_findings
from trtdeploy.triton.config.check.sequences import sequence_findings
from trtdeploy.triton.config.check.tensors import tensor_findings
from trtdeploy.triton.config.check.warmup import warmup_findings
from trtdeploy.triton.config.schema import schema

_PLATFORMS = {
    "tensorrt": {"", "tensorrt_plan"},
    "python": {""},
    "onnxruntime": {"", "onnxruntime_onnx"},
    "openvino": {""},
    "pytorch": {"", "pytorch_libtorch"},
}


def check_config(config: str | Any, folder: str | Path | None = None, *, gpus: int | None = None) -> list[Finding]:
    """Check a config as Triton would at load, and against the files that it will be served with.

    Args:
        config: The text of a ``config.pbtxt``, or a ``ModelConfig`` message.
        folder: The model's folder; without it, what depends on files is not checked.
        gpus: How many GPUs the server has; None counts those of this machine.

    Returns:
        What is wrong, errors first; nothing with severity "error" if Triton will take it.

    Raises:
        RuntimeUnavailableError: tritonclient is not installed.
    """
    message = config
    if isinstance(config, str):
        from google.protobuf import text_format

        try:
            message = text_format.Parse(config, schema().ModelConfig())
        except (text_format.ParseError, ValueError) as error:
            return [Finding("config.pbtxt", f"it is not a Triton model configuration: {error}.", "Mend this line.")]
    place = Path(folder) if folder is not None else None
    found = list(_findings(message, place, count_gpus() if gpus is None else gpus))
    return sorted(found, key=lambda finding: finding.severity != "error")


def count_gpus() -> int:
    """Return how many NVIDIA GPUs this machine has, by its device files."""
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia[0-9]*"))


def _findings(config: Any, folder: Path | None, gpus: int) -> Iterator[Finding]:
    yield from _identity(config, folder)
    yield from tensor_findings(config)
    yield from scheduling_findings(config)
    yield from sequence_findings(config)
    yield from instance_findings(config, gpus)
    yield from warmup_findings(config, folder)
    yield from ensemble_findings(config, folder)
    if folder is not None:
        yield from folder_findings(config, folder)
        yield from plan_findings(config, folder)


def _identity(config: Any, folder: Path | None) -> Iterator[Finding]:
    if folder is not None and config.name and config.name != folder.resolve().name:
        yield Finding(
            "name", f"{config.name!r} is not the name of the folder, {folder.resolve().name!r}.", "Leave name out."
        )
    if folder is None and not config.name:
        yield Finding("name", "it is missing.", "Give the name of the model's folder.")
    if config.max_batch_size < 0:
        yield Finding("max_batch_size", f"{config.max_batch_size} is negative.", "Give 0 for a model without a batch.")
    if config.platform == "ensemble" or config.HasField("ensemble_scheduling"):
        if config.backend:
            yield Finding("backend", f"an ensemble has none, got {config.backend!r}.", "Leave backend out.")
        return
    backend = config.backend or {"tensorrt_plan": "tensorrt", "onnxruntime_onnx": "onnxruntime"}.get(
        config.platform, "pytorch" if config.platform == "pytorch_libtorch" else ""
    )
    if not backend:
        backend = {"model.py": "python", "model.plan": "tensorrt", "model.onnx": "onnxruntime"}.get(
            config.default_model_filename, ""
        )
    if not backend and not config.platform and not config.default_model_filename and folder is not None:
        files = {path.name for path in folder.glob("[0-9]*/*")}
        backend = "tensorrt" if "model.plan" in files else "python" if "model.py" in files else ""
    if not backend:
        yield Finding(
            "backend",
            f"there is none, and platform {config.platform!r} and the files do not say which.",
            'Give backend: "python" or backend: "tensorrt".',
        )
    elif backend not in _PLATFORMS:
        yield Finding(
            "backend", f"{backend!r} is not known here.", f"Known: {', '.join(sorted(_PLATFORMS))}; is it misspelt?"
        )
    elif config.platform not in _PLATFORMS[backend]:
        yield Finding("platform", f"{config.platform!r} contradicts backend {backend!r}.", "Leave one of the two out.")
    if config.model_transaction_policy.decoupled and config.response_cache.enable:
        yield Finding("response_cache", "a decoupled model cannot be cached.", "Disable one of the two.")
    if config.HasField("sequence_batching") and config.response_cache.enable:
        yield Finding("response_cache", "a model with sequence batching cannot be cached.", "Disable one of the two.")
    for index, control in enumerate(config.model_metrics.metric_control):
        where = f"model_metrics.metric_control[{index}]"
        if not control.metric_identifier.family:
            yield Finding(f"{where}.metric_identifier", "it needs a family.", "Name the metric.")
        if not control.histogram_options.buckets:
            yield Finding(f"{where}.histogram_options", "it needs buckets.", "Give the upper bounds.")
