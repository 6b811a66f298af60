"""Looking at this machine: each heavy library in a process of its own, all at the same time."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from trtdeploy.doctor.machine import CacheFolder, Driver, Gpu, Library, Machine, Server
from trtdeploy.doctor.probe import PROBES
from trtdeploy.errors import RuntimeUnavailableError
from trtdeploy.module_command import module_command
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets, processor_name, usable_cores
from trtdeploy.triton.server.installation import cache_folder, find_tritonserver
from trtdeploy.version import __version__

PROBE_LIMIT_S = 90.0
"""Seconds that a library may take to answer; torch on a cold disk is the slowest."""
_SMI_FIELDS = "name,compute_cap,memory.total,driver_version"
_MEBIBYTE = 1 << 20
# As they are shown. Those without a probe are light: whether they are installed says enough.
_ORDER = (
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "onnx",
    "tritonclient",
    "torch",
    "pytorch-quantization",
    "scikit-learn",
    "safetensors",
)


def examine(*, probe_limit_s: float = PROBE_LIMIT_S) -> Machine:
    """Look at everything."""
    with ThreadPoolExecutor(max_workers=max(2, usable_cores())) as pool:
        probes = {name: pool.submit(run_probe, name, limit_s=probe_limit_s) for name in PROBES}
        smi = pool.submit(ask_nvidia_smi)
        answers = {name: probe.result() for name, probe in probes.items()}
        driver = read_driver(answers["cuda-python"], smi.result())
    return Machine(
        trtdeploy=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=f"{processor_name()} ({instruction_sets()})",
        driver=driver,
        libraries={name: _library(name, answers.get(name)) for name in _ORDER},
        server=find_server(),
        cache=look_at_cache(cache_folder()),
    )


def run_probe(name: str, *, limit_s: float = PROBE_LIMIT_S) -> dict[str, Any]:
    """Look at one library; a crash, a hang or nonsense of it is an answer too."""
    command = module_command("trtdeploy.doctor.probe", name)
    try:
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"state": "broken", "detail": f"it did not answer within {limit_s:g} s"}
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or ["it says nothing"])[-1]
        code = process.returncode
        how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        return {"state": "broken", "detail": f"importing it {how}: {last}"}
    try:
        answer = json.loads(process.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"state": "broken", "detail": "importing it ended the process"}
    return dict(answer)


def ask_nvidia_smi() -> Driver:
    """Return the driver and its GPUs as nvidia-smi lists them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Driver()
    try:
        table = _output(program, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits")
        overview = _output(program)
    except subprocess.CalledProcessError as error:
        said = (error.stdout + error.stderr).strip().partition("\n")[0].rstrip(".")
        return Driver(failure=said or f"nvidia-smi ended with exit code {error.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(failure=f"nvidia-smi failed: {error}")
    rows = [[field.strip() for field in row] for row in csv.reader(table.splitlines()) if len(row) == 4]
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", overview)
    return Driver(
        found_by="nvidia-smi",
        version=rows[0][3] if rows else None,
        cuda=cuda[1] if cuda else None,
        gpus=tuple(
            Gpu(name=name, capability=capability, memory_bytes=int(float(mebibytes)) * _MEBIBYTE)
            for name, capability, mebibytes, _ in rows
            if mebibytes.replace(".", "", 1).isdigit()
        ),
    )


def read_driver(cuda_python: Mapping[str, Any], smi: Driver) -> Driver:
    """Prefer what cuda-python says, because it sees what trtdeploy will see; nvidia-smi knows the driver's version."""
    gpus = tuple(Gpu(**gpu) for gpu in cuda_python.get("gpus", ()))
    cuda = cuda_python.get("driver_cuda")
    detail = str(cuda_python.get("detail", ""))
    if gpus:
        return Driver(found_by="cuda-python", version=smi.version, cuda=cuda, gpus=gpus, detail=detail)
    if smi.found_by == "none":
        # without a driver CUDA says that the driver is too old, which would mislead
        return Driver(cuda=cuda, failure=smi.failure, detail=detail if cuda else "there is no NVIDIA driver")
    return smi.model_copy(update={"detail": detail})


def find_server() -> Server:
    """Return the tritonserver that ``trtdeploy serve`` would start."""
    try:
        found = find_tritonserver()
    except RuntimeUnavailableError as error:
        return Server(detail=error.message)
    except OSError as error:
        return Server(detail=f"The one of nvidia-pytriton cannot be laid out in the cache folder: {error}.")
    home = found.binary.resolve().parent.parent
    backends = found.backends or home / "backends"
    version_file = home / "TRITON_VERSION"  # containers have it
    origin, version = found.origin, os.environ.get("TRITON_SERVER_VERSION")
    if version_file.is_file():
        version = version_file.read_text().strip()
    if origin == "nvidia-pytriton":  # which says its own version, not the server's
        origin, version = f"{origin} {metadata.version(origin)}", None
    names = sorted(folder.name for folder in backends.iterdir() if folder.is_dir()) if backends.is_dir() else []
    return Server(
        path=str(found.binary),
        origin=origin,
        version=version,
        backends=tuple(names),
        tensorrt=os.environ.get("TRT_VERSION") if "tensorrt" in names else None,
    )


def look_at_cache(folder: Path) -> CacheFolder:
    """Try to write into the user's cache folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return CacheFolder(path=str(folder), writable=False, detail=error.strerror or str(error))
    return CacheFolder(path=str(folder), writable=True)


def _library(name: str, answer: Mapping[str, Any] | None) -> Library:
    """Complete what a probe has answered; a process that died could not say which version it had."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    if answer is None:
        return Library(state="ok" if version else "missing", version=version)
    known = {"version": version, **answer} if answer["state"] != "missing" else answer
    return Library(**{key: value for key, value in known.items() if key in Library.model_fields})


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=True).stdout
