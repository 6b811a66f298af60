"""One model's plans for several GPUs: Triton loads the one for the compute capability that it finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtdeploy.errors import ModelError
from trtdeploy.plan import Manifest, read_plan


def plans_by_capability(config: Any, manifest: Manifest, others: Sequence[str | Path]) -> dict[str, bytes]:
    """Enter plans for other GPUs into the config, and return their files.

    Triton takes the file that ``cc_model_filenames`` has for a GPU's compute capability, else the default one.

    Raises:
        ModelError: One is of another runtime or model, or there are two for one compute capability.
        PlanCorruptError: One does not match its manifest.
    """
    files: dict[str, bytes] = {}
    taken = {manifest.device.capability}
    for path in others:
        content, other = read_plan(path)
        if other.runtime.name != "tensorrt" or manifest.runtime != other.runtime:
            raise ModelError(
                f"{path} is a plan of {other.runtime.name} {other.runtime.version}; plans for several "
                f"GPUs are TensorRT's, of one version: {manifest.runtime.name} {manifest.runtime.version}."
            )
        if (other.inputs, other.outputs, other.onnx.sha256) != (
            manifest.inputs,
            manifest.outputs,
            manifest.onnx.sha256,
        ):
            raise ModelError(f"{path} was built from another model.", hint="Build all plans from one ONNX file.")
        if other.device.capability in taken:
            raise ModelError(f"There are two plans for compute capability {other.device.capability}.")
        taken.add(other.device.capability)
        name = f"sm{other.device.capability}.plan"
        config.cc_model_filenames[other.device.capability] = name
        files |= {name: content, f"{name}.json": other.to_json().encode()}
    return files
