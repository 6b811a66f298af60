"""EfficientNet-B0 at 224: a bare Engine, the Python-backend model in Triton, and PyTriton, in turn in one run.

Bare Engine: as many threads as contexts ask it for batch 1. Served: `trtdeploy package` with one instance per core and
a real tritonserver. PyTriton: the same ONNX in as many ONNX Runtime sessions, of one thread each, with the same dynamic
batching. Both servers are asked by the same client: perf_analyzer where it is given, over gRPC and over gRPC with
inputs in system shared memory; else tritonclient in a process of its own. Every round measures all; the ratios are
medians over the rounds. The weights are random: speed does not depend on them.

    python -m benchmarks.serving_throughput --perf-analyzer PATH --output benchmarks/results/serving_throughput.json
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from trtdeploy import BuildConfig, Engine, build
from trtdeploy.files import atomic_write
from trtdeploy.runtimes.onnxruntime.cpu import processor_name, usable_cores
from trtdeploy.tensors import ShapeRange
from trtdeploy.triton.config.options import PackageOptions
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

SIZE = 224
MAX_BATCH = 8
CONCURRENCIES = (1, 8, 16, 32)
SHARED_MEMORY_CONCURRENCIES = (1, 16)
MODEL = "b0"
INPUT = "input"


def export_model(path: Path) -> None:
    """Write the float network with a dynamic batch."""
    import torch

    from training.models.efficientnet import efficientnet_b0
    from training.onnx_export import trace_to_onnx

    torch.manual_seed(0)
    network = efficientnet_b0(1000)
    with torch.no_grad():
        network.train()(torch.randn(8, 3, SIZE, SIZE))
    path.write_bytes(trace_to_onnx(network.eval(), torch.zeros(1, 3, SIZE, SIZE), opset=17))


def engine_throughput(plan: Path, contexts: int, seconds: float) -> float:
    """Return inferences per second of an Engine that as many threads ask as it has contexts."""
    batch = {INPUT: np.zeros((1, 3, SIZE, SIZE), np.float32)}
    counts = [0] * contexts
    with Engine.load(plan, contexts=contexts) as engine:
        engine.infer(batch)
        start = time.perf_counter()

        def ask(index: int) -> None:
            while time.perf_counter() - start < seconds:
                engine.infer(batch)
                counts[index] += 1

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(contexts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.perf_counter() - start)


def served_throughput(
    address: str, concurrency: int, seconds: float, analyzer: Path | None, *, shared_memory: bool = False
) -> dict[str, float]:
    """Return inferences per second and the median latency in milliseconds that a client in another process sees."""
    if analyzer is not None:
        options = ["--shared-memory", "system", "--output-shared-memory-size", "8192"] if shared_memory else []
        return _perf_analyzer(address, concurrency, seconds, analyzer, options)
    command = [sys.executable, "-m", "benchmarks.serving_throughput", "--client", address]
    done = subprocess.run(
        [*command, "--concurrency", str(concurrency), "--seconds", str(seconds)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _perf_analyzer(
    address: str, concurrency: int, seconds: float, analyzer: Path, options: Sequence[str]
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.csv"
        command = [str(analyzer), "-m", MODEL, "-u", address, "-i", "grpc", "--input-data", "zero", "-f", str(report)]
        command += ["--concurrency-range", str(concurrency), "--percentile", "50", "--max-trials", "10"]
        # three windows, whatever they say: the rounds tell how much the machine's speed varies
        command += ["--measurement-interval", str(round(1000 * seconds / 3)), "--stability-percentage", "999"]
        done = subprocess.run([*command, "--async", *options], capture_output=True, text=True, check=False)
        if not report.is_file() or not report.read_text():
            raise RuntimeError(f"perf_analyzer gave no figures: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        with report.open() as stream:
            row = next(csv.DictReader(stream))
        return {"per_s": float(row["Inferences/Second"]), "p50_ms": float(row["p50 latency"]) / 1000}


def run_client(address: str, concurrency: int, seconds: float) -> dict[str, float]:
    """Keep requests in flight over gRPC for a while: what the other process does."""
    import tritonclient.grpc

    client = tritonclient.grpc.InferenceServerClient(address)
    tensor = tritonclient.grpc.InferInput(INPUT, [1, 3, SIZE, SIZE], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 3, SIZE, SIZE), np.float32))
    latencies: list[float] = []
    client.infer(MODEL, [tensor])
    start = time.perf_counter()

    def ask() -> None:
        while time.perf_counter() - start < seconds:
            sent = time.perf_counter()
            client.infer(MODEL, [tensor])
            latencies.append(time.perf_counter() - sent)

    threads = [threading.Thread(target=ask) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    client.close()
    return {"per_s": len(latencies) / elapsed, "p50_ms": 1000 * statistics.median(latencies)}


@contextmanager
def pytriton(onnx: Path, instances: int) -> Iterator[str]:
    """Serve the ONNX file with PyTriton, in a process of its own as its users do; give the gRPC address."""
    with socket.socket() as http, socket.socket() as grpc, socket.socket() as metrics:
        for holder in (http, grpc, metrics):
            holder.bind(("127.0.0.1", 0))
        ports = [str(holder.getsockname()[1]) for holder in (http, grpc, metrics)]
    command = [
        sys.executable,
        "-m",
        "benchmarks.pytriton_server",
        str(onnx),
        MODEL,
        str(MAX_BATCH),
        "1",
        str(instances),
    ]
    environment = find_tritonserver().environment  # its stub needs the library of the running interpreter
    process = subprocess.Popen(
        [*command, *ports], env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _wait_until_ready(f"127.0.0.1:{ports[1]}", process)
        yield f"127.0.0.1:{ports[1]}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _wait_until_ready(address: str, process: subprocess.Popen[bytes], limit_s: float = 90.0) -> None:
    import tritonclient.grpc
    from tritonclient.utils import InferenceServerException

    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        client = tritonclient.grpc.InferenceServerClient(address)
        try:
            if client.is_model_ready(MODEL):
                return
        except InferenceServerException:
            pass
        finally:
            client.close()
        time.sleep(0.5)
    process.kill()
    _, errors = process.communicate()
    raise RuntimeError(f"PyTriton was not ready: {errors.decode(errors='replace')[-3000:]}")


def summarise(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the rounds, and the ratios within each round."""

    def best(entry: dict[str, Any], who: str) -> float:
        return float(max(value if isinstance(value, float) else value["per_s"] for value in entry[who].values()))

    names = [name for name in rounds[0] if isinstance(rounds[0][name], dict)]
    ways = [name.removeprefix("trtdeploy_") for name in names if name.startswith("trtdeploy_")]

    def ratio(first: str, second: str) -> float:
        return round(statistics.median(best(entry, first) / best(entry, second) for entry in rounds), 4)

    return {
        "best_per_s": {name: round(statistics.median(best(entry, name) for entry in rounds), 2) for name in names},
        "trtdeploy_to_engine": {way: ratio(f"trtdeploy_{way}", "engine") for way in ways},
        "trtdeploy_to_pytriton": {way: ratio(f"trtdeploy_{way}", f"pytriton_{way}") for way in ways},
        "p50_ms_at_concurrency_1": {
            name: round(statistics.median(entry[name]["1"]["p50_ms"] for entry in rounds), 3)
            for name in names
            if name != "engine"
        },
    }


def main() -> int:
    """Run the benchmark; exit code 1 if no way to the served model has 90% of the Engine, or one less than PyTriton."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--perf-analyzer", type=Path, help="the client of both servers")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--concurrency", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        sys.stdout.write(json.dumps(run_client(arguments.client, arguments.concurrency, arguments.seconds)))
        return 0
    seconds = arguments.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx = folder / "b0.onnx"
        export_model(onnx)
        shape = (3, SIZE, SIZE)
        profile = ShapeRange(min=(1, *shape), opt=(1, *shape), max=(MAX_BATCH, *shape))
        plan = build(onnx, folder / "b0.plan", BuildConfig(profiles=({INPUT: profile},)))
        package(plan.path, folder / "models", MODEL, options=PackageOptions(instances=usable_cores()))
        repository, ports = folder / "models", {"http_port": 0, "grpc_port": 0, "metrics_port": 0}

        @contextmanager
        def ours() -> Iterator[str]:
            with TritonServer(repository, find_tritonserver(), **ports) as server:
                yield re.sub("^grpc://", "", server.grpc_url)

        peers = (("trtdeploy", ours), ("pytriton", lambda: pytriton(onnx, usable_cores())))
        loads = [(False, count) for count in CONCURRENCIES]
        if arguments.perf_analyzer:
            loads += [(True, count) for count in SHARED_MEMORY_CONCURRENCIES]
        rounds: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            # what else the machine does: ratios of a busy one say little
            load = round(os.getloadavg()[0], 2)
            entry: dict[str, Any] = {"load_average": load, "engine": {}}
            for contexts in range(1, usable_cores() + 1):
                entry["engine"][str(contexts)] = engine_throughput(plan.path, contexts, seconds)
            for who, serving in peers:  # one at a time: a server that waits takes time too
                with serving() as address:
                    for shared, count in loads:
                        way = f"{who}_shared_memory" if shared else f"{who}_grpc"
                        entry.setdefault(way, {})[str(count)] = served_throughput(
                            address, count, seconds, arguments.perf_analyzer, shared_memory=shared
                        )
            rounds.append(entry)
            sys.stderr.write(f"round {number + 1} of {arguments.rounds}: {json.dumps(entry)}\n")
    result = {
        "model": f"EfficientNet-B0, {SIZE}x{SIZE}, float, batch 1 per request, dynamic batching up to {MAX_BATCH}",
        "client": "perf_analyzer" if arguments.perf_analyzer else "tritonclient in a process of its own",
        "processor": processor_name(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("onnxruntime", "nvidia-pytriton", "tritonclient")},
        **summarise(rounds),
        "rounds": rounds,
    }
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if arguments.output:
        atomic_write(arguments.output, text)
    enough = max(result["trtdeploy_to_engine"].values()) >= 0.9 and min(result["trtdeploy_to_pytriton"].values()) > 1
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
