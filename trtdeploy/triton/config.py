"""A plan's ``config.pbtxt``, rendered from Triton's own protobuf schema."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trtdeploy.errors import ModelError, RuntimeUnavailableError
from trtdeploy.onnxgraph.source import LABELS_KEY, PREPROCESSING_KEY
from trtdeploy.plan import Manifest
from trtdeploy.tensors import DYNAMIC, TensorSpec, dtype_to_triton

CONTEXTS_KEY = "trtdeploy.contexts"
LABELS_FILE = "labels.txt"
DEFAULT_MAX_BATCH_SIZE = 32


class PackageOptions(BaseModel):
    """How a plan shall be served; unknown keys are refused.

    Attributes:
        max_batch_size: Largest batch that Triton forms; None takes the profiles' largest, or 32 where the plan has a
            dynamic batch and no profile.
        instances: How many copies of the model Triton runs at the same time.
        contexts: Execution contexts inside each instance of a Python-backend model.
        max_queue_delay_us: How long a request may wait for others to share its batch, in microseconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_batch_size: int | None = Field(default=None, ge=1)
    instances: int = Field(default=1, ge=1)
    contexts: int = Field(default=1, ge=1)
    max_queue_delay_us: int = Field(default=0, ge=0)


def schema() -> Any:
    """Return tritonclient's ``model_config_pb2``.

    Raises:
        RuntimeUnavailableError: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise RuntimeUnavailableError(
            "Triton's configuration schema comes with tritonclient, which is not installed.",
            hint="pip install 'trtdeploy[triton]'",
        ) from error
    return model_config_pb2


def render_config(manifest: Manifest, name: str, options: PackageOptions) -> str:
    """Return the text of ``config.pbtxt``.

    Raises:
        ModelError: The plan cannot take the batch size that was asked for, or a data type cannot be served.
        RuntimeUnavailableError: tritonclient is not installed.
    """
    return config_text(make_config(manifest, name, options))


def config_text(config: Any) -> str:
    """Return a ``ModelConfig`` message as ``config.pbtxt`` holds it."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def make_config(manifest: Manifest, name: str, options: PackageOptions) -> Any:
    """Return a ``ModelConfig`` message; see ``render_config``."""
    pb = schema()
    on_tensorrt = manifest.runtime.name == "tensorrt"
    scalars = [spec for spec in (*manifest.inputs, *manifest.outputs) if not spec.shape]
    if scalars:
        raise ModelError(
            f"Triton serves no scalars; this plan has {', '.join(map(str, scalars))}.",
            hint="Export the model with at least one dimension for it.",
        )
    max_batch_size = _max_batch_size(manifest, options)
    config = pb.ModelConfig(name=name, backend="tensorrt" if on_tensorrt else "python", max_batch_size=max_batch_size)
    batched = max_batch_size > 0
    for spec in manifest.inputs:
        config.input.add(name=spec.name, data_type=_data_type(pb, spec), dims=_dims(spec, batched=batched))
    for spec in manifest.outputs:
        config.output.add(name=spec.name, data_type=_data_type(pb, spec), dims=_dims(spec, batched=batched))
    if manifest.labels is not None and len(config.output) == 1:
        config.output[0].label_filename = LABELS_FILE
    on_gpu = manifest.device.kind == "gpu"  # TensorRT-RTX has no backend of its own: the Python backend runs it
    kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    group = config.instance_group.add(count=options.instances, kind=kind)
    if on_tensorrt and len(manifest.profiles) > 1:
        # Triton's TensorRT backend makes a context for the first profile only unless they are listed
        group.profile.extend(map(str, range(len(manifest.profiles))))
    if max_batch_size > 1:
        config.dynamic_batching.max_queue_delay_microseconds = options.max_queue_delay_us
    if not on_tensorrt:
        config.parameters[CONTEXTS_KEY].string_value = str(options.contexts)
    if manifest.labels is not None:
        config.parameters[LABELS_KEY].string_value = json.dumps(manifest.labels)
    if manifest.preprocessing is not None:
        config.parameters[PREPROCESSING_KEY].string_value = manifest.preprocessing.to_json()
    return config


def _data_type(pb: Any, spec: TensorSpec) -> int:
    triton = dtype_to_triton(spec.dtype)
    return int(pb.DataType.Value(f"TYPE_{triton}"))


def _dims(spec: TensorSpec, *, batched: bool) -> tuple[int, ...]:
    return spec.shape[1:] if batched else spec.shape


def _max_batch_size(manifest: Manifest, options: PackageOptions) -> int:
    """Return Triton's max_batch_size: 0 means that the first dimension is not a batch."""
    # Triton's dims leave the batch out and cannot be empty
    unfit = [spec for spec in (*manifest.inputs, *manifest.outputs) if spec.shape[0] != DYNAMIC or len(spec.shape) == 1]
    if unfit:
        if options.max_batch_size is not None:
            raise ModelError(
                f"max_batch_size {options.max_batch_size} needs a dynamic first dimension, and a second one, in every "
                f"input and output; not so: {', '.join(map(str, unfit))}.",
                hint="Export the model with a dynamic batch, or package without a batch size.",
            )
        return 0
    largest = max(
        (min(shapes.max[0] for shapes in profile.values()) for profile in manifest.profiles if profile), default=None
    )
    if options.max_batch_size is None:
        return DEFAULT_MAX_BATCH_SIZE if largest is None else largest
    if largest is not None and options.max_batch_size > largest:
        raise ModelError(
            f"max_batch_size {options.max_batch_size} is larger than what the plan's profiles cover ({largest}).",
            hint="Build the plan with a larger --shape, or package with a smaller batch.",
        )
    return options.max_batch_size
