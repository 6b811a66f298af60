"""Looking at one library in a process of its own: ``python -m trtdeploy.doctor.probe NAME``.

An import may crash the process, hang or print; the answer is the last line of stdout, one JSON object.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from trtdeploy.doctor.tensorrt_probe import probe_bindings

Answer = dict[str, Any]


def probe_onnxruntime() -> Answer:
    """Import ONNX Runtime and run a graph of one node."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    from trtdeploy.runtimes.onnxruntime.witness import Witness

    one = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", one[:1], one[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (result,) = Witness(model)({"x": np.ones(1, np.float32)})
    if float(result[0]) != -1.0:
        raise RuntimeError(f"-1 was computed as {result[0]}")
    try:
        cuda = importlib.import_module("onnxruntime.capi.build_and_package_info").cuda_version
    except (ImportError, AttributeError):  # builds for CPUs name no CUDA
        cuda = None
    return {"version": onnxruntime.__version__, "cuda": cuda or None}


def probe_tensorrt() -> Answer:
    """Import TensorRT and make a builder."""
    return probe_bindings("tensorrt")


def probe_tensorrt_rtx() -> Answer:
    """Import TensorRT-RTX and make a builder."""
    return probe_bindings("tensorrt_rtx")


def probe_cuda() -> Answer:
    """Ask the driver for its GPUs, through cuda-python."""
    runtime = importlib.import_module("cuda.bindings.runtime")
    answer: Answer = {"version": _version_of("cuda-python") or _version_of("cuda-bindings"), "gpus": []}
    error, version = runtime.cudaDriverGetVersion()
    if int(error) == 0 and version:
        answer["driver_cuda"] = f"{version // 1000}.{version % 1000 // 10}"
    error, count = runtime.cudaGetDeviceCount()
    if int(error) != 0:
        _, text = runtime.cudaGetErrorString(error)
        answer["detail"] = text.decode(errors="replace")
        return answer
    for index in range(count):
        error, properties = runtime.cudaGetDeviceProperties(index)
        if int(error) != 0:
            answer["detail"] = f"GPU {index} does not answer: {error}"
            continue
        name = properties.name
        gpu = {
            "name": name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": int(properties.totalGlobalMem),
        }
        answer["gpus"].append(gpu)
    return answer


def probe_tritonclient() -> Answer:
    """Import what ``package`` and ``validate`` need of tritonclient."""
    importlib.import_module("tritonclient.grpc.model_config_pb2")
    importlib.import_module("tritonclient.http")
    return {"version": _version_of("tritonclient")}


def probe_torch() -> Answer:
    """Import torch."""
    torch = importlib.import_module("torch")
    return {"version": str(torch.__version__), "cuda": torch.version.cuda}


def probe_pytorch_quantization() -> Answer:
    """Import pytorch-quantization; its modules import torch."""
    importlib.import_module("pytorch_quantization.nn")
    return {"version": _version_of("pytorch-quantization")}


PROBES: dict[str, tuple[str, Callable[[], Answer]]] = {
    "torch": ("torch", probe_torch),
    "pytorch-quantization": ("pytorch_quantization", probe_pytorch_quantization),
    "onnxruntime": ("onnxruntime", probe_onnxruntime),
    "tensorrt": ("tensorrt", probe_tensorrt),
    "tensorrt-rtx": ("tensorrt_rtx", probe_tensorrt_rtx),
    "cuda-python": ("cuda", probe_cuda),
    "tritonclient": ("tritonclient", probe_tritonclient),
}
"""By the library's name: its Python module, and the function that looks at it. The slowest come first."""


def answer(name: str) -> Answer:
    """Look at a library; whatever it raises is part of the answer."""
    module, look = PROBES[name]
    try:
        return {"state": "ok", **look()}
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == module:
            return {"state": "missing"}
        return {"state": "broken", "version": _version_of(name), "detail": str(error)}
    except BaseException as error:
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return {"state": "broken", "version": _version_of(name), "detail": detail}


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(answer(sys.argv[1])) + "\n")
