"""Inputs and outputs: names, data types, dims, reshapes, ragged batches (``ValidateModelIOConfig``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from trtdeploy.triton.config.check.finding import Finding
from trtdeploy.triton.config.schema import schema

_DYNAMIC = -1


def tensor_findings(config: Any) -> Iterator[Finding]:
    """Check every input, output, batch input and batch output."""
    on_tensorrt = "tensorrt" in (config.backend, config.platform.removesuffix("_plan"))
    for kind in ("input", "output"):
        seen: set[str] = set()
        tensors = getattr(config, kind)
        if not tensors:
            yield Finding(kind, f"there is no {kind}.", f"Describe every {kind} of the model.")
        for index, tensor in enumerate(tensors):
            where = f"{kind}[{index}]"
            yield from _one(where, tensor, config.max_batch_size, on_tensorrt=on_tensorrt)
            if tensor.name and tensor.name in seen:
                yield Finding(f"{where}.name", f"{tensor.name!r} is there twice.", "Every tensor has its own name.")
            seen.add(tensor.name)
    for index, tensor in enumerate(config.input):
        if tensor.format != 0 and len(tensor.dims) != 3:
            yield Finding(
                f"input[{index}].format", f"NHWC and NCHW need 3 dims, got {len(tensor.dims)}.", "Leave format out."
            )
        if tensor.allow_ragged_batch and config.max_batch_size == 0:
            yield Finding(
                f"input[{index}].allow_ragged_batch", "the model has no batch.", "Leave it out.", severity="warning"
            )
    yield from _batch_tensors(config)


def _one(where: str, tensor: Any, max_batch_size: int, *, on_tensorrt: bool) -> Iterator[Finding]:
    if not tensor.name:
        yield Finding(f"{where}.name", "it is missing.", "Give the tensor's name in the model.")
    if tensor.data_type == schema().TYPE_INVALID:
        yield Finding(f"{where}.data_type", "it is missing.", "Give one, TYPE_FP32 for example.")
    if not tensor.dims:
        yield Finding(f"{where}.dims", "they are missing.", "Give the dims, without the batch: dims: [ 3, 224, 224 ].")
    bad = [size for size in tensor.dims if size < 1 and size != _DYNAMIC]
    if bad:
        yield Finding(f"{where}.dims", f"{bad} cannot be a size.", "Sizes are 1 or more, or -1 where they vary.")
    if tensor.HasField("reshape"):
        yield from _reshape(f"{where}.reshape", list(tensor.dims), list(tensor.reshape.shape), max_batch_size)
    if tensor.is_shape_tensor and not on_tensorrt:
        yield Finding(f"{where}.is_shape_tensor", "only TensorRT has shape tensors.", "Leave it out.")
    if tensor.is_non_linear_format_io:
        if not on_tensorrt:
            yield Finding(f"{where}.is_non_linear_format_io", "only TensorRT has such formats.", "Leave it out.")
        elif len(tensor.dims) != 3:
            yield Finding(f"{where}.is_non_linear_format_io", f"it needs 3 dims, got {len(tensor.dims)}.")


def _reshape(where: str, dims: list[int], shape: list[int], max_batch_size: int) -> Iterator[Finding]:
    bad = [size for size in shape if size < 1 and size != _DYNAMIC]
    if bad:
        yield Finding(where, f"{bad} cannot be a size.", "Sizes are 1 or more, or -1 where they vary.")
        return
    if not shape:
        if max_batch_size == 0:
            yield Finding(
                where, "it is empty, and the model has no batch: Triton has no scalars.", "Give shape: [ 1 ]."
            )
        elif _DYNAMIC in dims or prod(dims) != 1:
            yield Finding(where, f"an empty shape has one element; dims {dims} have not.", "Leave reshape out.")
        return
    if _between_dynamic(dims) != _between_dynamic(shape):
        yield Finding(
            where,
            f"shape {shape} has not as many elements as dims {dims}.",
            "Both need the same number of elements between sizes that vary.",
        )


def _between_dynamic(dims: Sequence[int]) -> list[int]:
    counts = [1]
    for size in dims:
        if size == _DYNAMIC:
            counts.append(1)
        else:
            counts[-1] *= size
    return counts


def _batch_tensors(config: Any) -> Iterator[Finding]:
    pb = schema()
    inputs = {tensor.name for tensor in config.input}
    outputs = {tensor.name for tensor in config.output}
    for field in ("batch_input", "batch_output"):
        for index, tensor in enumerate(getattr(config, field)):
            where = f"{field}[{index}]"
            if len(tensor.source_input) != 1:
                yield Finding(f"{where}.source_input", f"one is expected, got {len(tensor.source_input)}.")
            unknown = [name for name in tensor.source_input if name not in inputs]
            if unknown:
                yield Finding(f"{where}.source_input", f"there is no input {unknown}.", f"Inputs: {sorted(inputs)}.")
            if field == "batch_input":
                if tensor.data_type not in (pb.TYPE_INT32, pb.TYPE_FP32):
                    yield Finding(f"{where}.data_type", "it must be TYPE_INT32 or TYPE_FP32.")
                continue
            names = list(tensor.target_name)
            unknown = [name for name in names if name not in outputs]
            if unknown:
                yield Finding(f"{where}.target_name", f"there is no output {unknown}.", f"Outputs: {sorted(outputs)}.")
            if len(set(names)) != len(names):
                yield Finding(f"{where}.target_name", "an output is there twice.")
