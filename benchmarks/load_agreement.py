"""`trtdeploy load` and perf_analyzer in turn on one tritonserver: do throughput and p50 agree within 10%?

The model is a small convolutional network at 224 pixels with random weights, about as much work as an EfficientNet-B0.

    python -m benchmarks.load_agreement --perf-analyzer PATH --output benchmarks/results/load_agreement.json
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import trtdeploy
from trtdeploy import BuildConfig, build
from trtdeploy.files import atomic_write
from trtdeploy.runtimes.onnxruntime.cpu import processor_name, usable_cores
from trtdeploy.tensors import ShapeRange
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

SHAPE = (3, 224, 224)
ALLOWED = 0.10


def make_model(path: Path) -> None:
    """Write five convolutions, a pool and a classifier."""
    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    constants: list[Any] = []
    last = "input"
    for index, (inputs, outputs, stride) in enumerate(((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, 64, 1), (64, 64, 1))):
        weights = rng.standard_normal((outputs, inputs, 3, 3)) / np.sqrt(9 * inputs)
        constants.append(numpy_helper.from_array(weights.astype(np.float32), f"w{index}"))
        attributes = {"strides": [stride] * 2, "pads": [1] * 4}
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], **attributes))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"a{index}"]))
        last = f"a{index}"
    constants.append(numpy_helper.from_array(rng.standard_normal((64, 1000)).astype(np.float32), "w"))
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def ours(server: TritonServer, concurrency: int, window_s: float) -> dict[str, float | bool]:
    """Measure with ``trtdeploy load`` in a process of its own."""
    command = [sys.executable, "-m", "trtdeploy", "load", "--url", server.grpc_url, "--model", "network", "--json"]
    options = ["--concurrency", str(concurrency), "--window", str(window_s), "--max-windows", "8", "--warm-up", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=True)
    point = json.loads(done.stdout)["points"][0]
    return {
        "per_s": point["requests_per_s"],
        "p50_ms": point["latency_ms"]["p50"]["value"],
        "stable": point["stable"],
    }


def theirs(
    binary: Path, server: TritonServer, concurrency: int, window_s: float, folder: Path, stability_percent: float
) -> dict[str, Any]:
    """Measure with perf_analyzer, synchronous as we are."""
    table = folder / "perf.csv"
    command = [str(binary), "-m", "network", "-u", server.grpc_url.removeprefix("grpc://"), "-i", "grpc", "--sync"]
    window = [
        "-p",
        str(round(1000 * window_s)),
        "--max-trials",
        "8",
        "--percentile",
        "50",
        "-s",
        str(stability_percent),
    ]
    command += ["--concurrency-range", str(concurrency), *window, "-f", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if not table.exists():
        raise SystemExit(f"perf_analyzer measured nothing:\n{done.stdout}\n{done.stderr}")
    with table.open() as stream:
        row = next(csv.DictReader(stream))
    return {
        "per_s": float(row["Inferences/Second"]),
        "p50_ms": float(row["p50 latency"]) / 1e3,
        "stable": done.returncode == 0,
    }


def main() -> int:
    """Run the comparison; exit code 1 if a median ratio is off by more than 10%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perf-analyzer", type=Path, required=True, help="e.g. from the tritonclient 2.45 wheel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=float, default=2.0)
    parser.add_argument(
        "--stability", type=float, default=10, help="perf_analyzer's; larger where others keep the machine busy"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "network.onnx")
        shapes = ShapeRange(min=(1, *SHAPE), opt=(1, *SHAPE), max=(8, *SHAPE))
        config = BuildConfig(profiles=({"input": shapes},), threads=1)
        plan = build(folder / "network.onnx", folder / "network.plan", config)
        package(plan.path, folder / "models", "network")
        with TritonServer(folder / "models", find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0) as server:
            for turn in range(arguments.rounds):
                for concurrency in (1, 2, 4):
                    # in turn, the other one first each time, so that drift of the machine hits both alike
                    pair: dict[str, Any] = {}
                    for who in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
                        pair[who] = (
                            ours(server, concurrency, arguments.window)
                            if who == "ours"
                            else theirs(
                                arguments.perf_analyzer,
                                server,
                                concurrency,
                                arguments.window,
                                folder,
                                arguments.stability,
                            )
                        )
                    rounds.append({"round": turn, "concurrency": concurrency, **pair})
                    print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)  # noqa: T201
    ratios = {
        str(concurrency): {
            what: round(
                statistics.median(
                    entry["ours"][what] / entry["theirs"][what]
                    for entry in rounds
                    if entry["concurrency"] == concurrency
                ),
                4,
            )
            for what in ("per_s", "p50_ms")
        }
        for concurrency in (1, 2, 4)
    }
    agrees = all(abs(ratio - 1) <= ALLOWED for pair in ratios.values() for ratio in pair.values())
    result = {
        "processor": processor_name(),
        "cores": usable_cores(),
        "perf_analyzer_stability_percent": arguments.stability,
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "trtdeploy": trtdeploy.__version__,
        "tritonserver": "nvidia-pytriton's",
        "median_ratio_ours_to_theirs": ratios,
        "within_10_percent": agrees,
        "rounds": rounds,
    }
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if arguments.output:
        atomic_write(arguments.output, text)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
