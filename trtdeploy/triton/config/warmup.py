"""Warm-up requests from real samples: one data file per input, one request per batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trtdeploy.errors import ModelError, UsageError
from trtdeploy.files import atomic_write, sha256_bytes
from trtdeploy.plan import Manifest
from trtdeploy.tensors import DYNAMIC, Array, TensorSpec, dtype_to_triton
from trtdeploy.triton.config.options import PackageOptions, Warmup
from trtdeploy.triton.config.schema import schema

WARMUP_FOLDER = "warmup"
"""Where Triton looks for the files, in the model's folder."""


def add_warmup(config: Any, manifest: Manifest, options: PackageOptions) -> None:
    """Add one request per batch size. Triton repeats the sample until the batch is full.

    Raises:
        ModelError: A sample does not fit its input, or a batch size is not served.
        UsageError: A sample cannot be read.
    """
    if options.warmup is None:
        return
    samples = _samples(manifest, options.warmup, batched=config.max_batch_size > 0)
    sizes = set(options.warmup.batch_sizes) or {1, config.max_batch_size or 1, *options.preferred_batch_sizes}
    largest = max(config.max_batch_size, 1)
    if not all(1 <= size <= largest for size in sizes):
        raise ModelError(f"Warm-up batches are 1 to {largest}, got {sorted(sizes)}.")
    for size in sorted(sizes):
        request = config.model_warmup.add(name=f"batch-{size}", batch_size=size, count=options.warmup.count)
        for index, (spec, sample) in enumerate(samples):
            value = request.inputs[spec.name]
            value.data_type = schema().DataType.Value(f"TYPE_{dtype_to_triton(spec.dtype)}")
            value.dims.extend(sample.shape)
            value.input_data_file = _file_name(index, sample)


def write_warmup(folder: Path, manifest: Manifest, options: PackageOptions, *, batched: bool) -> None:
    """Write the data files into a model's folder; their names say what they hold, so that none is ever changed."""
    if options.warmup is None:
        return
    for index, (_, sample) in enumerate(_samples(manifest, options.warmup, batched=batched)):
        target = folder / WARMUP_FOLDER / _file_name(index, sample)
        if not target.exists():
            atomic_write(target, sample.tobytes())


def _file_name(index: int, sample: Array) -> str:
    return f"input{index}-{sha256_bytes(sample.tobytes())[:16]}.raw"


def _samples(manifest: Manifest, warmup: Warmup, *, batched: bool) -> list[tuple[TensorSpec, Array]]:
    names = [spec.name for spec in manifest.inputs]
    if sorted(names) != sorted(warmup.samples):
        raise ModelError(
            f"Warm-up needs a sample for every input ({', '.join(names)}); given: {', '.join(warmup.samples)}."
        )
    return [(spec, _sample(spec, warmup.samples[spec.name], batched=batched)) for spec in manifest.inputs]


def _sample(spec: TensorSpec, path: Path, *, batched: bool) -> Array:
    try:
        sample: Array = np.ascontiguousarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"The warm-up sample {path} cannot be read as a .npy file: {error}") from error
    expected = spec.shape[1:] if batched else spec.shape
    if batched and sample.shape[:1] == (1,) and len(sample.shape) == len(spec.shape):
        sample = sample[0]
    fits = len(sample.shape) == len(expected) and all(
        want in (DYNAMIC, size) for want, size in zip(expected, sample.shape, strict=True)
    )
    if not fits or sample.dtype.name != spec.dtype:
        raise ModelError(
            f"The warm-up sample {path} is {sample.dtype.name}{list(sample.shape)}; input {spec.name} takes "
            f"{spec.dtype}{list(expected)}{' without the batch' if batched else ''}.",
            hint="Save one preprocessed sample: numpy.save(FILE, array)",
        )
    return sample
