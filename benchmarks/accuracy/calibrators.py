"""Our calibration beside that of pytorch-quantization, ModelOpt and ONNX Runtime: accuracy and wall time.

    python -m benchmarks.accuracy.calibrators [--images N] [--rounds N]

Everybody gets the same float network and the same calibration images, decoded beforehand. pytorch-quantization's
calibrators sit at the places of ours; ModelOpt and ONNX Runtime place their own quantizers, as their users get them.
Time is that of collecting and of computing ranges; where several methods share one pass, each is charged with it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy.results import CIFAR10, FLOAT_CHECKPOINT, Table, require, write_result
from training.checkpoints.checkpoint import load_checkpoint
from training.onnx_export import export_checkpoint, onnx_predictor
from training.predict import predictor
from training.ptq.ranges import fix_ranges, observing_inputs, quantizers_off
from training.quantization import QuantizationSpec, Quantizer, quantize, quantizers
from trtdeploy.calibration import METHODS, AbsHistogram, AbsMaximum, Method
from trtdeploy.data import Dataset, open_dataset
from trtdeploy.ledger.evaluation import map_labels
from trtdeploy.statistics import compare_paired
from trtdeploy.tensors import Array

_LARGEST_BATCH = 64
_MOST_BINS = 8192
"""Of a histogram that pytorch-quantization's entropy is asked about: its time grows with the square of the bins."""


@dataclass(frozen=True)
class Entrant:
    """One way to find ranges: who, which method, the seconds it took, and the quantized network that came out."""

    who: str
    method: str
    seconds: float
    predict: Callable[[Array], Array]


def ours(network: nn.Module, batches: Sequence[Tensor]) -> Iterator[Entrant]:
    """Our methods: ``max`` from a pass that keeps the largest values, all others from one that fills histograms."""
    passes: tuple[tuple[type[AbsMaximum], tuple[Method, ...]], ...] = (
        (AbsMaximum, ("max",)),
        (AbsHistogram, METHODS[1:]),
    )
    for collector, methods in passes:
        model = quantize(deepcopy(network), QuantizationSpec(), example=batches[0][:1])
        began = time.perf_counter()
        with observing_inputs(model, collector) as collected:
            for batch in batches:
                model(batch)
        passed = time.perf_counter() - began
        for method in methods:
            for percentile in (99.9, 99.99) if method == "percentile" else (99.99,):
                began = time.perf_counter()
                fix_ranges(model, collected, method=method, percentile=percentile)
                seconds = passed + time.perf_counter() - began
                name = f"{method} {percentile:g}" if method == "percentile" else method
                yield Entrant("trtdeploy", name, seconds, predictor(deepcopy(model)))


def of_pytorch_quantization(network: nn.Module, batches: Sequence[Tensor], said: list[str]) -> Iterator[Entrant]:
    """Its calibrators on our placement; its MSE needs a GPU."""
    from pytorch_quantization.calib import HistogramCalibrator, MaxCalibrator

    for kind, computations in (
        (MaxCalibrator, (("max", {}),)),
        (
            HistogramCalibrator,
            (
                ("percentile 99.9", {"method": "percentile", "percentile": 99.9}),
                ("percentile 99.99", {"method": "percentile", "percentile": 99.99}),
                ("entropy", {"method": "entropy"}),
            ),
        ),
    ):
        model = quantize(deepcopy(network), QuantizationSpec(), example=batches[0][:1])
        watched = [quantizer for _, quantizer in quantizers(model) if quantizer.of_activation]
        calibrators = {quantizer: kind(8, None, False) for quantizer in watched}

        def hook(quantizer: Quantizer, calibrators: Mapping[Quantizer, Any] = calibrators) -> Callable[..., None]:
            return lambda _, given: calibrators[quantizer].collect(given[0])

        handles = [quantizer.register_forward_pre_hook(hook(quantizer)) for quantizer in watched]
        began = time.perf_counter()
        with quantizers_off(model), torch.no_grad():
            for batch in batches:
                model(batch)
        collected = time.perf_counter() - began
        for handle in handles:
            handle.remove()
        fix_ranges(model, {}, method="max")  # the weights
        for name, options in computations:
            bins = max(len(getattr(calibrator, "_calib_hist", ())) for calibrator in calibrators.values())
            if name == "entropy" and bins > _MOST_BINS:
                said.append(
                    f"pytorch-quantization's entropy was left out: outliers after the first batch made its largest "
                    f"histogram {bins} bins, and its search takes time with the square of that"
                )
                continue
            began = time.perf_counter()
            for quantizer, calibrator in calibrators.items():
                quantizer.set_amax(calibrator.compute_amax(**options).clamp(min=1e-8))
            seconds = collected + time.perf_counter() - began
            yield Entrant("pytorch-quantization", name, seconds, predictor(deepcopy(model)))


def of_modelopt(network: nn.Module, batches: Sequence[Tensor]) -> Iterator[Entrant]:
    """ModelOpt's INT8_DEFAULT_CFG: max. Its histogram calibrators are not offered by ``mtq.quantize``."""
    import modelopt.torch.quantization as mtq

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    model = deepcopy(network)
    began = time.perf_counter()
    model = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward)
    yield Entrant("ModelOpt", "max", time.perf_counter() - began, predictor(model))


def of_onnxruntime(onnx_file: Path, batches: Sequence[Tensor], folder: Path) -> Iterator[Entrant]:
    """ONNX Runtime's quantize_static: its default, and symmetric INT8 as TensorRT takes it."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Array] | None:
            batch = next(self._left, None)
            return None if batch is None else {"input": np.ascontiguousarray(batch.numpy())}

    prepared = folder / "prepared.onnx"
    quant_pre_process(str(onnx_file), str(prepared))
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    for name, method, options in (
        ("minmax, its default", CalibrationMethod.MinMax, {}),
        ("minmax, symmetric", CalibrationMethod.MinMax, symmetric),
        ("percentile 99.999, symmetric", CalibrationMethod.Percentile, symmetric),
        ("entropy, symmetric", CalibrationMethod.Entropy, symmetric),
    ):
        output = folder / "quantized.onnx"
        began = time.perf_counter()
        quantize_static(
            str(prepared),
            str(output),
            Reader(),
            per_channel=True,
            calibrate_method=method,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options=options,
        )
        yield Entrant("ONNX Runtime", name, time.perf_counter() - began, onnx_predictor(output.read_bytes()))


def main() -> None:
    """Measure everybody and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=CIFAR10)
    parser.add_argument("--checkpoint", type=Path, default=FLOAT_CHECKPOINT)
    parser.add_argument("--images", type=int, default=None, help="Score so many test images (default: all).")
    parser.add_argument("--rounds", type=int, default=3, help="Time everybody so often, in turn.")
    arguments = parser.parse_args()
    require(arguments.data, arguments.checkpoint)
    warnings.filterwarnings("ignore")
    with open_dataset(str(arguments.data)) as dataset, tempfile.TemporaryDirectory() as name:
        result = _measure(dataset, arguments.checkpoint, arguments.images, arguments.rounds, Path(name))
    path = write_result("calibrators", result, tables=[_table(result)])
    sys.stdout.write(f"{path}\n")


def _batch_size(images: int) -> int:
    """Return a size that leaves no smaller batch at the end: ONNX Runtime's histograms take equal ones only."""
    return max(size for size in range(1, _LARGEST_BATCH + 1) if images % size == 0)


def _measure(dataset: Dataset, checkpoint: Path, images: int | None, rounds: int, folder: Path) -> dict[str, Any]:
    start = load_checkpoint(checkpoint, dataset=dataset)
    preprocessing = start.facts.preprocessing
    split = dataset.split("calibration")
    batches = [
        torch.from_numpy(batch.inputs).to(memory_format=torch.channels_last)
        for batch in split.batches(preprocessing, _batch_size(len(split)))
    ]
    export_checkpoint(start, folder / "float.onnx", dataset)
    network = start.model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    test = dataset.split("test")
    chosen = np.arange(len(test)) if images is None else np.linspace(0, len(test) - 1, images).round().astype(int)
    pixels = preprocessing.normalise(test.pixels(preprocessing, chosen))
    labels = np.asarray(map_labels(dataset, start.facts.labels))[test.labels[chosen]]

    def answers(predict: Callable[[Array], Array]) -> Array:
        return np.concatenate([predict(pixels[i : i + 128]).argmax(axis=1) for i in range(0, len(pixels), 128)])

    missing: list[str] = []
    found: dict[tuple[str, str], Entrant] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    peers: tuple[tuple[str, Callable[[], Iterator[Entrant]]], ...] = (
        ("trtdeploy", lambda: ours(network, batches)),
        ("pytorch-quantization", lambda: of_pytorch_quantization(network, batches, missing)),
        ("ModelOpt", lambda: of_modelopt(network, batches)),
        ("ONNX Runtime", lambda: of_onnxruntime(folder / "float.onnx", batches, folder)),
    )
    for number in range(rounds):
        for who, make in peers:
            try:
                for entrant in make():
                    found[who, entrant.method] = entrant
                    seconds.setdefault((who, entrant.method), []).append(entrant.seconds)
            except ImportError as error:
                missing.append(f"{who} is not installed: {error}")
            sys.stderr.write(f"round {number + 1} of {rounds}: {who} is done\n")
    exact = answers(predictor(network))
    entrants: list[dict[str, Any]] = []
    for (who, method), entrant in found.items():
        given = answers(entrant.predict)
        change = compare_paired(exact == labels, given == labels)
        entrants.append(
            {
                "who": who,
                "method": method,
                "seconds": [round(each, 2) for each in seconds[who, method]],
                "top1": 100 * float((given == labels).mean()),
                "against_float": change.difference.model_dump(),
                "agreement": 100 * float((given == exact).mean()),
            }
        )
        sys.stderr.write(f"{entrants[-1]}\n")
    return {
        "calibration_images": len(split),
        "test_images": len(labels),
        "float_top1": 100 * float((exact == labels).mean()),
        "entrants": entrants,
        "missing": sorted(set(missing)),
    }


def _table(result: Mapping[str, Any]) -> Table:
    fastest = min(min(entrant["seconds"]) for entrant in result["entrants"] if entrant["who"] == "trtdeploy")
    rows = [
        (
            entrant["who"],
            entrant["method"],
            f"{entrant['top1']:.2f}",
            "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**entrant["against_float"]),
            f"{entrant['agreement']:.2f}",
            f"{min(entrant['seconds']) / fastest:.2f}",
        )
        for entrant in result["entrants"]
    ]
    note = (
        f"EfficientNet-B0, CIFAR-10 at 64x64; {result['calibration_images']} calibration images, "
        f"{result['test_images']} test images; float {result['float_top1']:.2f}%. Time is a ratio to our fastest, "
        f"the least of {len(result['entrants'][0]['seconds'])} rounds in which all took turns. "
        "pytorch-quantization's MSE needs a GPU; ModelOpt offers max."
    )
    if result["missing"]:
        note += " ".join(["", *(f"{each}." for each in result["missing"])])
    return Table(
        "Calibrators side by side",
        ("who", "method", "test top-1 %", "against float (paired)", "agreement with float %", "time"),
        tuple(rows),
        note,
    )


if __name__ == "__main__":
    main()
