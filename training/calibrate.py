"""Post-training quantization: find the range of every weight and activation, without training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from training.checkpoint import (
    CalibrationFacts,
    Checkpoint,
    CheckpointFacts,
    DevMetrics,
    SavedCheckpoint,
    dataset_facts,
    save_checkpoint,
    warn_of_other_splits,
)
from training.loop import score
from training.quantization import (
    SMALLEST_AMAX,
    Method,
    QuantizationSpec,
    Quantizer,
    largest_per_channel,
    quantize,
    quantized_layers,
    quantizers,
)
from trtdeploy.datasets import Dataset
from trtdeploy.errors import LedgerError, QuantizationError, UsageError
from trtdeploy.evaluation import Progress, map_labels
from trtdeploy.files import sha256_bytes
from trtdeploy.preprocessing import Preprocessing

CALIBRATION_BATCH = 64


def calibrate(
    dataset: Dataset,
    start: Checkpoint,
    output: Path,
    *,
    spec: QuantizationSpec | None = None,
    method: Method = "percentile",
    percentile: float = 99.99,
    images: int | None = None,
    seed: int = 0,
    split_seed: int = 0,
    progress: Progress | None = None,
) -> SavedCheckpoint:
    """Quantize a float checkpoint to INT8 and write it with its ranges.

    Args:
        dataset: Labelled images; only those of the split ``calibration`` are looked at, and of ``dev`` for the score.
        start: A float checkpoint. Its network is changed.
        output: The ``.safetensors`` file to write.
        spec: What is quantized; everything if None.
        method: Activations: the largest |x|, or a percentile of all |x|. Weights always use the largest |w|.
        percentile: Percent of the values that lie inside the range.
        images: How many of the calibration images to use, drawn with ``seed``; all if None.
        seed: Decides which.
        split_seed: The one that the dataset was opened with.
        progress: Called with the number of images done.

    Raises:
        UsageError: The checkpoint is quantized already, a number makes no sense, or a pattern matches no layer.
        QuantizationError: A range is not finite, a layer never runs, or nothing can be quantized.
    """
    started = time.perf_counter()
    if start.facts.kind != "float":
        raise UsageError(f"{start.path} is quantized already ({start.facts.kind}); calibrate takes a float checkpoint.")
    if not 0 < percentile < 100:
        raise UsageError(f"--percentile {percentile:g} is not between 0 and 100.", hint="For 100, use --method max.")
    split = dataset.split("calibration")
    if images is not None and not 1 <= images <= len(split):
        raise UsageError(f"--images {images}: the calibration split of {dataset.name} has {len(split)} images.")
    warn_of_other_splits(start, dataset)
    preprocessing = start.facts.preprocessing
    chosen = np.arange(len(split))
    if images is not None:
        chosen = np.sort(np.random.default_rng(seed).choice(len(split), size=images, replace=False))
    spec = spec or QuantizationSpec()
    model = quantize(start.model.eval(), spec, example=torch.zeros(1, *preprocessing.sample_shape))

    parts = np.array_split(chosen, range(CALIBRATION_BATCH, len(chosen), CALIBRATION_BATCH))
    done = 0
    pixels = hashlib.sha256()
    with observing_inputs(model, method=method):
        for part in parts:
            decoded = split.pixels(preprocessing, part)
            pixels.update(decoded.tobytes())
            inputs = preprocessing.normalise(decoded)
            model(torch.from_numpy(inputs).to(memory_format=torch.channels_last))
            done += len(part)
            if progress:
                progress(done, len(chosen))
    clamped = fix_ranges(model, percentile=percentile)
    ids = sorted(split.ids[index] for index in chosen)
    facts = CheckpointFacts(
        kind="ptq",
        model=start.facts.model,
        labels=start.facts.labels,
        preprocessing=preprocessing,
        dataset=dataset_facts(dataset, split_seed=split_seed),
        training=start.facts.training,
        calibration=CalibrationFacts(
            method=method,
            percentile=percentile if method == "percentile" else None,
            images=len(ids),
            seed=seed,
            image_ids_sha256=sha256_bytes("\n".join(ids).encode()),
            pixels_sha256=pixels.hexdigest(),
            clamped_ranges=clamped,
        ),
        quantization=spec,
        dev=_score(model, dataset, preprocessing, start.facts.labels),
        parent_sha256=start.sha256,
    )
    sha256 = save_checkpoint(output, model.state_dict(), facts)
    return SavedCheckpoint(path=output, sha256=sha256, facts=facts, seconds=time.perf_counter() - started)


@contextmanager
def observing_inputs(model: nn.Module, *, method: Method = "max") -> Iterator[None]:
    """Run the network in float while every quantizer of an activation shows what passes to its calibrator."""
    for _, quantizer in quantizers(model):
        quantizer.disable_quant()
    activations = _activations(model)
    for quantizer in activations:
        quantizer.calibrate_by(method)
        quantizer.enable_calib()
    try:
        with torch.no_grad():
            yield
    finally:
        for quantizer in activations:
            quantizer.disable_calib()
        for _, quantizer in quantizers(model):
            quantizer.enable_quant()


def fix_ranges(model: nn.Module, *, percentile: float = 99.99) -> int:
    """Turn what the calibrators saw into ranges.

    Args:
        model: A quantized network after ``observing_inputs``.
        percentile: Of the calibrators that take one.

    Returns:
        How many ranges were 0, because a tensor never varied or a channel is dead, and are tiny now.

    Raises:
        QuantizationError: A layer never ran, or a range is not finite.
    """
    clamped = 0
    found = [(quantizer, quantizer.computed_amax(percentile=percentile)) for quantizer in _activations(model)]
    found += [(layer.weight_quantizer, largest_per_channel(layer)) for layer in quantized_layers(model)]
    for quantizer, amax in found:
        if amax is None:
            raise QuantizationError(
                f"{quantizer.label} was never computed during calibration, so it has no range.",
                hint="Remove layers that the network does not run from the model.",
            )
        if not bool(torch.isfinite(amax).all()):
            raise QuantizationError(f"The range of {quantizer.label} is not finite.")
        clamped += int((amax < SMALLEST_AMAX).sum())
        quantizer.set_amax(amax.clamp(min=SMALLEST_AMAX))
    return clamped


def _activations(model: nn.Module) -> list[Quantizer]:
    return [quantizer for _, quantizer in quantizers(model) if quantizer.of_activation]


def _score(model: nn.Module, dataset: Dataset, preprocessing: Preprocessing, labels: Sequence[str]) -> DevMetrics:
    try:
        return score(model, dataset.split("dev"), preprocessing, map_labels(dataset, labels))
    except LedgerError as error:
        raise QuantizationError(
            "The quantized network's answers on dev are not finite.", hint="Evaluate the float checkpoint first."
        ) from error
