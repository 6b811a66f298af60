"""EfficientNet-B0 at 224 pixels, batch 1, one thread: float, and Q/DQ of either target as exported and as a plan.

All in turn in one run.

The weights are random: latency does not depend on them. Batch norm has seen images of noise, and ranges are calibrated
by maximum on noise, so that no activation is degenerate.

    python -m benchmarks.plan_latency --output benchmarks/results/plan_latency.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from training.models.efficientnet import efficientnet_b0
from training.onnx_export import trace_to_onnx
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import QuantizationSpec, quantize
from trtdeploy import BuildConfig, Engine, build
from trtdeploy.files import atomic_write
from trtdeploy.onnxgraph.qdq.placement import Target
from trtdeploy.onnxgraph.qdq.unsigned_codes import with_unsigned_activations
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets, processor_name, usable_cores
from trtdeploy.statistics import percentile

SIZE = 224
_MOST_OF_FLOAT = 1.25

TARGETS: tuple[Target, ...] = ("tensorrt", "onnxruntime")


def export_models(folder: Path) -> tuple[Path, dict[Target, Path]]:
    """Write the float model and its calibrated Q/DQ twins."""
    torch.manual_seed(0)
    network = efficientnet_b0(1000)
    noise = torch.randn(8, 3, SIZE, SIZE)
    with torch.no_grad():
        for _ in range(3):
            network.train()(noise)
    network.eval()
    float_onnx = folder / "float.onnx"
    float_onnx.write_bytes(trace_to_onnx(network, torch.zeros(1, 3, SIZE, SIZE), opset=17))
    written: dict[Target, Path] = {}
    for target in TARGETS:
        quantized = quantize(copy.deepcopy(network), QuantizationSpec(target=target), example=noise[:1])
        with observing_inputs(quantized) as histograms:
            quantized(noise)
        fix_ranges(quantized, histograms)
        model = onnx.load_from_string(trace_to_onnx(quantized, torch.zeros(1, 3, SIZE, SIZE), opset=17))
        written[target] = folder / f"{target}.onnx"
        onnx.save(with_unsigned_activations(model) if target == "onnxruntime" else model, written[target])
    return float_onnx, written


def as_exported(path: Path) -> Callable[[dict[str, Any]], Any]:
    """Return a runner of an ONNX file with ONNX Runtime's defaults and one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def measure(runners: dict[str, Callable[[dict[str, Any]], Any]], rounds: int) -> dict[str, list[float]]:
    """Time all runners in turn, so that a change of the machine's speed hits all of them alike; milliseconds."""
    inputs = {"input": np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(-3, rounds):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner(inputs)
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> int:
    """Run the benchmark; exit code 1 if a plan, of either target, takes more than 1.25 times the float model's time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        float_onnx, qdq_onnx = export_models(folder)
        plans = {
            target: build(path, path.with_suffix(".plan"), BuildConfig(threads=1)) for target, path in qdq_onnx.items()
        }
        with ExitStack() as stack:
            runners: dict[str, Callable[[dict[str, Any]], Any]] = {"float": as_exported(float_onnx)}
            for target, plan in plans.items():
                runners[f"{target}, as exported"] = as_exported(qdq_onnx[target])
                runners[f"{target}, plan"] = stack.enter_context(Engine.load(plan.path, threads=1)).infer
            times = measure(runners, arguments.rounds)
    ratios = {
        name: percentile([a / b for a, b in zip(times[name], times["float"], strict=True)], 50).model_dump()
        for name in times
        if name != "float"
    }
    result = {
        "model": f"EfficientNet-B0, {SIZE}x{SIZE}, batch 1, one thread",
        "processor": processor_name(),
        "instruction_sets": instruction_sets(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "rounds": arguments.rounds,
        "median_ms": {key: round(statistics.median(values), 3) for key, values in times.items()},
        "ratio_to_float": ratios,
        "tactics": {
            target: plan.manifest.tactic.model_dump() if plan.manifest.tactic else None
            for target, plan in plans.items()
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if arguments.output:
        atomic_write(arguments.output, text)
    return 0 if all(ratios[f"{target}, plan"]["value"] <= _MOST_OF_FLOAT for target in TARGETS) else 1


if __name__ == "__main__":
    sys.exit(main())
