"""A plan's ``config.pbtxt``, rendered from Triton's own protobuf schema."""

from __future__ import annotations

import json
from typing import Any

from trtdeploy.errors import ModelError, UsageError
from trtdeploy.onnxgraph.reading.source import LABELS_KEY, PREPROCESSING_KEY
from trtdeploy.plan import Manifest
from trtdeploy.tensors import DYNAMIC, TensorSpec, dtype_to_triton
from trtdeploy.triton.config.labels import unmatched_labels
from trtdeploy.triton.config.options import CONTEXTS_KEY, DEFAULT_MAX_BATCH_SIZE, PackageOptions
from trtdeploy.triton.config.scheduling import (
    add_cuda_graphs,
    add_dynamic_batching,
    add_rate_limiter,
    add_version_policy,
)
from trtdeploy.triton.config.schema import schema
from trtdeploy.triton.config.warmup import add_warmup

LABELS_FILE = "labels.txt"


def render_config(manifest: Manifest, name: str, options: PackageOptions) -> str:
    """Return the text of ``config.pbtxt``.

    Raises:
        ModelError: The plan cannot take the batch size that was asked for, a data type cannot be served, or a class
            that it scores has no label.
        UsageError: An option would change nothing.
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
        broken = next((label for label in manifest.labels if len(label.splitlines()) > 1), None)
        if broken is not None:
            raise ModelError(
                f"The label {broken!r} has a line break; {LABELS_FILE} of Triton's has one label a line.",
                hint="Build the plan from a model with other labels.",
            )
        unmatched = unmatched_labels(manifest)
        if unmatched is not None and unmatched[1] < unmatched[0]:
            raise ModelError(
                f"The plan scores {unmatched[0]} classes and has {unmatched[1]} labels: the others have no name.",
                hint="Build it from a model whose ONNX metadata names every class once, in the order of its scores.",
            )
        config.output[0].label_filename = LABELS_FILE
    on_gpu = manifest.device.kind == "gpu"  # TensorRT-RTX has no backend of its own: the Python backend runs it
    kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    group = config.instance_group.add(count=options.instances, kind=kind)
    if options.gpus and not on_gpu:
        raise ModelError(
            f"gpus {list(options.gpus)} was asked for, but this plan is for {manifest.device.name}, a CPU.",
            hint="Leave gpus out, or build the plan on a GPU.",
        )
    group.gpus.extend(options.gpus)
    _add_profiles(group, manifest, options, on_tensorrt=on_tensorrt)
    add_dynamic_batching(config, options)
    add_rate_limiter(group, options)
    add_version_policy(config, options)
    if options.response_cache:
        config.response_cache.enable = True
    if options.cuda_graphs:
        if not on_tensorrt:
            raise ModelError(
                f"cuda_graphs are captured by Triton's TensorRT backend; this plan runs on {manifest.runtime.name}.",
                hint="Leave cuda_graphs out.",
            )
        add_cuda_graphs(config, manifest, options)
    add_warmup(config, manifest, options)
    if on_tensorrt and options.contexts > 1:
        raise UsageError(
            f"contexts {options.contexts} are for the Python backend; Triton's TensorRT backend has one per instance.",
            hint=f"Give instances {options.instances * options.contexts} instead.",
        )
    if not on_tensorrt:
        config.parameters[CONTEXTS_KEY].string_value = str(options.contexts)
    if manifest.labels is not None:
        config.parameters[LABELS_KEY].string_value = json.dumps(manifest.labels)
    if manifest.preprocessing is not None:
        config.parameters[PREPROCESSING_KEY].string_value = manifest.preprocessing.to_json()
    return config


def _add_profiles(group: Any, manifest: Manifest, options: PackageOptions, *, on_tensorrt: bool) -> None:
    count = len(manifest.profiles)
    if options.profiles and not on_tensorrt:
        raise ModelError("profiles are chosen for Triton's TensorRT backend only.", hint="Leave profiles out.")
    unknown = [number for number in options.profiles if not 0 <= number < count]
    if unknown:
        raise ModelError(f"The plan has {count} profiles, numbered from 0; there is none with number {unknown}.")
    chosen = options.profiles or (range(count) if on_tensorrt and count > 1 else ())
    # Triton's TensorRT backend makes a context for the first profile only unless they are listed
    group.profile.extend(map(str, chosen))


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
