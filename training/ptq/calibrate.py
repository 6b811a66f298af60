"""Post-training quantization: find the range of every weight and activation, without training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.checkpoints.checkpoint import (
    BiasCorrectionFacts,
    CalibrationCandidate,
    CalibrationFacts,
    Checkpoint,
    CheckpointFacts,
    DevMetrics,
    SavedCheckpoint,
    dataset_facts,
    save_checkpoint,
    warn_of_other_splits,
)
from training.loop.epochs import score
from training.predict import device_of
from training.ptq.bias_correction import correct_biases
from training.ptq.ranges import fix_ranges, observe
from training.quantization import (
    QuantizationSpec,
    QuantizedLayer,
    Quantizer,
    count_layers,
    give_room,
    prepare,
    quantized_layers,
)
from trtdeploy.calibration import AbsHistogram, AbsMaximum, Method
from trtdeploy.data import Dataset, Split
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import LedgerError, QuantizationError, UsageError
from trtdeploy.files import sha256_bytes
from trtdeploy.ledger.evaluation import Progress, map_labels

CALIBRATION_BATCH = 64
_CPU = torch.device("cpu")
PERCENTILES = (99.9, 99.99, 99.999)
"""The percentiles that ``all`` tries."""

MethodOrAll = Method | Literal["all"]


def calibrate(
    dataset: Dataset,
    start: Checkpoint,
    output: Path,
    *,
    spec: QuantizationSpec | None = None,
    method: MethodOrAll = "relative-mse",
    percentile: float = 99.99,
    images: int | None = None,
    seed: int = 0,
    split_seed: int = 0,
    bias_correction: bool = False,
    device: torch.device = _CPU,
    progress: Progress | None = None,
) -> SavedCheckpoint:
    """Quantize a float checkpoint to INT8 and write it with its ranges.

    Args:
        dataset: Labelled images; only those of the split ``calibration`` are looked at, and of ``dev`` for the score.
        start: A float checkpoint. Its network is changed.
        output: The ``.safetensors`` file to write.
        spec: What is quantized; everything if None.
        method: How the ranges of activations are found, see ``trtdeploy.calibration.amax_of``; ``all`` scores every
            method on ``dev`` and takes the best. Weights always use the largest |w| of each output channel.
        percentile: Percent of the values that lie inside the range; for ``percentile``, and one more try of ``all``.
        images: How many of the calibration images to use, drawn with ``seed``; all if None.
        seed: Decides which.
        split_seed: The one that the dataset was opened with.
        bias_correction: Correct the biases afterwards, on the same images; see ``training.ptq.bias_correction``.
        device: Where the network runs meanwhile, in float32.
        progress: Called with the number of images done; those of the correction count once more.

    Raises:
        UsageError: The checkpoint is quantized already, a number makes no sense, or a pattern matches no layer.
        QuantizationError: A range is not finite, a layer never runs, or nothing can be quantized; or
            biases are to be corrected in a network that cannot be traced.
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
    chosen = _draw(len(split), images, seed)
    example = torch.zeros(1, *preprocessing.sample_shape, device=device)
    model = prepare(start.model.eval().to(device), example, spec)
    spec = next(quantized_layers(model)).spec  # without what prepare leaves in float
    images_to_pass = len(chosen) * (2 if bias_correction else 1)

    def passed(done: int) -> None:
        if progress:
            progress(done, images_to_pass)

    collector = AbsMaximum if method == "max" else AbsHistogram
    collected, pixels_sha256 = _observe(model, collector, split, chosen, preprocessing, passed)

    def dev_score() -> DevMetrics:
        return _score(model, dataset, preprocessing, start.facts.labels)

    candidates: tuple[CalibrationCandidate, ...] = ()
    if method == "all":
        candidates = tuple(
            _try(model, collected, candidate, value, dev_score) for candidate, value in _tries(percentile)
        )
        best = max(candidates, key=lambda candidate: (candidate.dev.top1, -candidate.dev.loss))
        method, percentile = best.method, best.percentile or percentile
    clamped = fix_ranges(model, collected, method=method, percentile=percentile)
    dev = best.dev if candidates else dev_score()
    corrected: BiasCorrectionFacts | None = None
    if bias_correction:
        corrected = _correct(model, _shuffled(split, chosen, preprocessing, seed, device), dev, len(chosen), passed)
        give_room(model)
        dev = dev_score()
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
            pixels_sha256=pixels_sha256,
            clamped_ranges=clamped,
            idle_layers=_idle_layers(model),
            candidates=candidates,
            bias_correction=corrected,
        ),
        quantization=spec,
        layers=count_layers(model, example, spec=spec),
        dev=dev,
        parent_sha256=start.sha256,
    )
    sha256 = save_checkpoint(output, model.state_dict(), facts)
    return SavedCheckpoint(path=output, sha256=sha256, facts=facts, seconds=time.perf_counter() - started)


def _idle_layers(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if isinstance(module, QuantizedLayer) and module.idle)


def _draw(available: int, images: int | None, seed: int) -> NDArray[np.int64]:
    chosen = np.arange(available)
    if images is not None:
        chosen = np.sort(np.random.default_rng(seed).choice(available, size=images, replace=False))
    return chosen


def _observe(
    model: nn.Module,
    collector: type[AbsMaximum],
    split: Split,
    chosen: NDArray[np.int64],
    preprocessing: Preprocessing,
    passed: Callable[[int], None],
) -> tuple[dict[Quantizer, AbsMaximum], str]:
    """Run the chosen images through the network once; return what was collected and the digest of the pixels."""
    pixels = hashlib.sha256()

    def batches() -> Iterator[Tensor]:
        done = 0
        for part in np.array_split(chosen, range(CALIBRATION_BATCH, len(chosen), CALIBRATION_BATCH)):
            decoded = split.pixels(preprocessing, part)
            pixels.update(decoded.tobytes())
            yield _as_input(decoded, preprocessing, device_of(model))
            done += len(part)
            passed(done)

    collected = observe(model, batches(), collector)
    return collected, pixels.hexdigest()


def _shuffled(
    split: Split, chosen: NDArray[np.int64], preprocessing: Preprocessing, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield the chosen images as model input in a random order, so that the first ones are of all classes."""
    order = np.random.default_rng([seed, 1]).permutation(chosen)
    for part in np.array_split(order, range(CALIBRATION_BATCH, len(order), CALIBRATION_BATCH)):
        yield _as_input(split.pixels(preprocessing, part), preprocessing, device)


def _correct(
    model: nn.Module, batches: Iterator[Tensor], before: DevMetrics, images: int, passed: Callable[[int], None]
) -> BiasCorrectionFacts:
    correction = correct_biases(model, batches, progress=lambda done, nodes: passed(images + images * done // nodes))
    return BiasCorrectionFacts(
        images=correction.images,
        corrected=correction.corrected,
        left_out=correction.left_out,
        dev_before=before,
    )


def _as_input(decoded: NDArray[np.uint8], preprocessing: Preprocessing, device: torch.device) -> Tensor:
    return torch.from_numpy(preprocessing.normalise(decoded)).to(device, memory_format=torch.channels_last)


def _tries(percentile: float) -> list[tuple[Method, float | None]]:
    """Return what ``all`` tries: each method with its percentile, if it takes one."""
    percentiles = sorted({*PERCENTILES, percentile})
    plain: tuple[Method, ...] = ("mse", "relative-mse", "entropy")
    return [("max", None), *(("percentile", value) for value in percentiles), *((method, None) for method in plain)]


def _try(
    model: nn.Module,
    collected: Mapping[Quantizer, AbsMaximum],
    method: Method,
    percentile: float | None,
    dev_score: Callable[[], DevMetrics],
) -> CalibrationCandidate:
    fix_ranges(model, collected, method=method, percentile=percentile or 100.0)
    return CalibrationCandidate(method=method, percentile=percentile, dev=dev_score())


def _score(model: nn.Module, dataset: Dataset, preprocessing: Preprocessing, labels: Sequence[str]) -> DevMetrics:
    try:
        return score(model, dataset.split("dev"), preprocessing, map_labels(dataset, labels))
    except LedgerError as error:
        raise QuantizationError(
            "The quantized network's answers on dev are not finite.", hint="Evaluate the float checkpoint first."
        ) from error
