"""Warm-up requests: Triton runs them before a model is ready, and a bad one keeps it from becoming so."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from trtdeploy.triton.config.check.finding import Finding
from trtdeploy.triton.config.schema import schema

_BYTES = {
    **dict.fromkeys(("TYPE_BOOL", "TYPE_UINT8", "TYPE_INT8"), 1),
    **dict.fromkeys(("TYPE_UINT16", "TYPE_INT16", "TYPE_FP16", "TYPE_BF16"), 2),
    **dict.fromkeys(("TYPE_UINT32", "TYPE_INT32", "TYPE_FP32"), 4),
    **dict.fromkeys(("TYPE_UINT64", "TYPE_INT64", "TYPE_FP64"), 8),
}


def warmup_findings(config: Any, folder: Path | None) -> Iterator[Finding]:
    """Check every request against the inputs and the data files."""
    inputs = {tensor.name: tensor for tensor in config.input}
    largest = max(config.max_batch_size, 1)
    for index, request in enumerate(config.model_warmup):
        where = f"model_warmup[{index}]"
        if not 1 <= request.batch_size <= largest:
            yield Finding(f"{where}.batch_size", f"{request.batch_size} is not between 1 and {largest}.")
        missing = [name for name, tensor in inputs.items() if name not in request.inputs and not tensor.optional]
        if missing:
            yield Finding(f"{where}.inputs", f"{missing} are missing.", "Give data for every input.")
        for name, value in request.inputs.items():
            place = f"{where}.inputs[{name!r}]"
            if name not in inputs:
                yield Finding(place, "there is no such input.", f"Inputs: {sorted(inputs)}.")
            else:
                yield from _value(place, value, inputs[name], folder)


def _value(place: str, value: Any, tensor: Any, folder: Path | None) -> Iterator[Finding]:
    names = schema().DataType
    if value.data_type != tensor.data_type:
        yield Finding(
            f"{place}.data_type", f"{names.Name(value.data_type)}; the input is {names.Name(tensor.data_type)}."
        )
    dims, expected = list(value.dims), list(tensor.dims)
    if any(size < 1 for size in dims):
        yield Finding(f"{place}.dims", f"{dims} must be fixed sizes of 1 or more.")
        return
    if len(dims) != len(expected) or any(want not in (-1, size) for want, size in zip(expected, dims, strict=True)):
        yield Finding(f"{place}.dims", f"{dims} do not fit the input's {expected}.", "Leave the batch out.")
        return
    source = value.WhichOneof("input_data_type")
    if source is None:
        yield Finding(place, "there is no data.", "Give zero_data, random_data or input_data_file.")
    elif source != "input_data_file" and not getattr(value, source):
        yield Finding(f"{place}.{source}", "it is false: there is no data.", "Give true.")
    elif source == "input_data_file" and folder is not None:
        file = folder / "warmup" / value.input_data_file
        if not file.is_file():
            yield Finding(f"{place}.input_data_file", f"there is no file {file}.")
        elif (size := _BYTES.get(names.Name(value.data_type))) and file.stat().st_size != prod(dims) * size:
            yield Finding(
                f"{place}.input_data_file",
                f"{file} has {file.stat().st_size} bytes; {prod(dims) * size} are expected.",
                "Write one sample of the input's data type, without the batch.",
            )
