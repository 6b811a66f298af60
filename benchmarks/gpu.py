"""What a GPU gives: latency, throughput, overlap, copies, and what Python costs per call.

    python -m benchmarks.gpu [--model MODEL.onnx] [--output benchmarks/results/gpu-CARD-DATE.json]

Builds the model with every TensorRT that is installed and supports the card, and measures side by side in one run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtdeploy.building.build import BuildConfig, build
from trtdeploy.cuda.api import load_api
from trtdeploy.cuda.device import Device
from trtdeploy.engine import Engine
from trtdeploy.engine.benchmark import bench
from trtdeploy.errors import RuntimeUnavailableError, TrtDeployError
from trtdeploy.files import atomic_write
from trtdeploy.onnxgraph.reading.source import load_source
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.tensorrt.runtime import TensorRTRuntime
from trtdeploy.tensors import ShapeRange, random_inputs

BATCHES = (1, 8, 32)
CONTEXTS = (1, 2, 4)
DURATION_S = 2.0


def convolutions(*, channels: int = 128, layers: int = 12, size: int = 56) -> onnx.ModelProto:
    """A stack of quantized 3x3 convolutions with ReLU: INT8 kernels fuse all of it."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray[Any, Any]) -> str:
        constants.append(numpy_helper.from_array(values, name))
        return name

    def qdq(name: str, scale: np.ndarray[Any, Any], axis: int = 1) -> str:
        parameters = [constant(f"{name}.scale", scale), constant(f"{name}.zero", np.zeros(scale.shape, np.int8))]
        nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.q"], axis=axis))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", *parameters], [f"{name}.dq"], axis=axis))
        return f"{name}.dq"

    last = "input"
    for index in range(layers):
        width = 3 if index == 0 else channels
        weight = (rng.standard_normal((channels, width, 3, 3)) * np.sqrt(2 / (9 * width))).astype(np.float32)
        scales = (np.abs(weight).reshape(channels, -1).max(axis=1) / 127).astype(np.float32)
        source = qdq(last, np.float32(4 / 127).reshape(()))
        inputs = [source, qdq(constant(f"w{index}", weight), scales, axis=0)]
        nodes.append(helper.make_node("Conv", inputs, [f"c{index}"], name=f"conv{index}", pads=[1, 1, 1, 1]))
        last = "y" if index == layers - 1 else f"r{index}"
        nodes.append(helper.make_node("Relu", [f"c{index}"], [last]))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", channels, size, size])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def tiny() -> onnx.ModelProto:
    """One addition of four numbers: what is left is the price of a call."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def median_us(call: Callable[[], object], *, count: int = 2000) -> float:
    """Return the median microseconds of a call, after a warm-up of a tenth as many."""
    for _ in range(count // 10):
        call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return round(statistics.median(times), 2)


def measure(runtime: str, model: Path, folder: Path) -> dict[str, Any]:
    """Build and measure one flavour."""
    source = load_source(model)
    spec = source.inputs[0]
    shapes = [tuple(batch if size < 0 else size for size in spec.shape) for batch in (1, BATCHES[1], BATCHES[-1])]
    profile = {spec.name: ShapeRange(min=shapes[0], opt=shapes[1], max=shapes[2])}
    start = time.perf_counter()
    plan = build(model, folder / f"{runtime}.plan", BuildConfig(runtime=runtime, profiles=(profile,)))
    facts: dict[str, Any] = {
        "version": plan.manifest.runtime.version,
        "build_s": round(time.perf_counter() - start, 2),
        "precision": plan.manifest.precision.model_dump(mode="json"),
    }
    points = bench(plan.path, batches=BATCHES, contexts=CONTEXTS, warm_up_s=1.0, duration_s=DURATION_S)
    facts["sweep"] = [point.model_dump(mode="json") for point in points]
    facts["overlap"] = overlap(plan.path, spec.name, shapes[1])
    facts["call"] = calls(runtime, folder)
    return facts


def attempt(runtime: str, model: Path, folder: Path) -> str:
    """Load and run a plan on a card that its library does not name; in a process of its own, as it may crash."""
    code = (
        "import sys; from pathlib import Path; from trtdeploy.building.build import BuildConfig, build\n"
        "from trtdeploy.plan import read_plan; from trtdeploy.runtimes import get_runtime\n"
        "from trtdeploy.runtimes.config import LoadOptions; from trtdeploy.tensors import random_inputs\n"
        "plan = build(sys.argv[2], sys.argv[3], BuildConfig(runtime=sys.argv[1]))\n"
        "content, manifest = read_plan(plan.path)\n"
        "loaded = get_runtime(sys.argv[1]).load(content, manifest, LoadOptions())\n"
        "context = loaded.create_context()\n"
        "print({n: a.shape for n, a in context.execute(random_inputs(manifest.inputs)).items()})\n"
    )
    arguments = [sys.executable, "-c", code, runtime, str(model), str(folder / f"{runtime}-attempt.plan")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    last = (done.stdout or done.stderr).strip().splitlines()[-1:] or ["no word"]
    return f"exit code {done.returncode}: {last[0]}"


def overlap(plan: Path, name: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Return how many times as many inferences per second several in flight give, against one after the other."""
    inputs = {name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    rates = {}
    for contexts in CONTEXTS:
        with Engine.load(plan, contexts=contexts, timeout_s=None) as engine:
            for _ in engine.map([inputs] * 50, in_flight=2 * contexts):
                pass
            start = time.perf_counter()
            for _ in engine.map([inputs] * 400, in_flight=2 * contexts):
                pass
            rates[str(contexts)] = 400 / (time.perf_counter() - start)
    return {contexts: round(rate / rates["1"], 3) for contexts, rate in rates.items()}


def calls(runtime: str, folder: Path) -> dict[str, float]:
    """Return microseconds per call on a model that computes almost nothing, with and without CUDA graphs."""
    model = folder / "tiny.onnx"
    onnx.save(tiny(), model)
    plan = build(model, folder / f"tiny-{runtime}.plan", BuildConfig(runtime=runtime))
    inputs = random_inputs(plan.manifest.inputs)
    result: dict[str, float] = {}
    for graphs in (0, 8):
        with Engine.load(plan.path, options=LoadOptions(cuda_graphs=graphs)) as engine:
            suffix = "graph" if graphs else "plain"
            result[f"infer, {suffix}, us"] = median_us(lambda: engine.infer(inputs))  # called here
            with engine.lease() as lease:
                result[f"lease, {suffix}, us"] = median_us(lambda: lease.execute(inputs))
    return result


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an ONNX file with one input [default: a stack of convolutions]")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    try:
        device = Device(load_api(), 0)
    except RuntimeUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "card": device.name,
        "compute_capability": device.capability,
        "cuda": device.api.cuda_version,
        "python": platform.python_version(),
        "model": arguments.model.name if arguments.model else "12 quantized 3x3 convolutions, 128 channels, 56x56",
        "runtimes": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model
        if model is None:
            model = folder / "convolutions.onnx"
            onnx.save(convolutions(), model)
        for runtime, module in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
            if importlib.util.find_spec(module) is None:
                results["runtimes"][runtime] = {"skipped": "not installed"}
            elif not TensorRTRuntime.runs_here(runtime):
                results["runtimes"][runtime] = {
                    "skipped": f"does not support {device.name} ({device.capability})",
                    "tried all the same": attempt(runtime, model, folder),
                }
            else:
                try:
                    results["runtimes"][runtime] = measure(runtime, model, folder)
                except TrtDeployError as error:
                    results["runtimes"][runtime] = {"failed": str(error)}
    card = "-".join(device.name.lower().split())
    output = arguments.output or Path(__file__).parent / "results" / f"gpu-{card}-{results['date']}.json"
    atomic_write(output, json.dumps(results, indent=2) + "\n")
    print(output)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
