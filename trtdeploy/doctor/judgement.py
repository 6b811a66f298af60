"""What a machine can do, and what on it does not fit together; each problem comes with what mends it."""

from __future__ import annotations

from collections.abc import Iterator

from trtdeploy.doctor.machine import Driver, Library, Machine
from trtdeploy.doctor.triton_releases import TENSORRT_OF_RELEASE, numbers
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.runtimes.tensorrt.runtime import RTX_TARGETS as RTX_TARGETS
from trtdeploy.runtimes.tensorrt.runtime import is_target as is_target

TITLES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
EXTRAS = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "rtx",
    "cuda-python": "tensorrt",
    "tritonclient": "triton",
    "torch": "training",
    "pytorch-quantization": "training",
    "scikit-learn": "training",
    "safetensors": "training",
}
"""The extra of trtdeploy that brings a library."""
TRAINING = ("torch", "pytorch-quantization", "scikit-learn", "safetensors")
# The oldest driver of each major version of CUDA: https://docs.nvidia.com/deploy/cuda-compatibility/
_OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.65"}
_OLDEST_CUDA_PYTHON = (12, 9)


class Ability(FrozenModel):
    """What a runtime can do here; a reason is empty where it can."""

    build: bool
    run: bool
    why_not_build: str = ""
    why_not_run: str = ""


class Command(FrozenModel):
    """Whether a command will work here.

    Attributes:
        works: Whether it does.
        note: What it lacks, or for what it works.
    """

    works: bool
    note: str = ""


class Problem(FrozenModel):
    """Something that does not fit.

    Attributes:
        what: What was found and what was expected.
        mend: A command, or what to do where no command can.
    """

    what: str
    mend: str


def abilities(machine: Machine) -> dict[str, Ability]:
    """Say of each runtime whether it builds and runs plans here."""
    return {
        "onnxruntime": _onnxruntime(machine.library("onnxruntime")),
        "tensorrt": _tensorrt(machine),
        "tensorrt-rtx": _tensorrt_rtx(machine),
    }


def commands(machine: Machine, able: dict[str, Ability]) -> dict[str, Command]:
    """Say of each command whether it will work."""
    onnxruntime = able["onnxruntime"].why_not_run
    untrained = _absent(machine, *TRAINING)
    client = _absent(machine, "tritonclient")
    server = "" if machine.server.path else machine.server.detail
    running = [name for name, ability in able.items() if ability.run]
    runs = Command(works=bool(running), note=f"plans of {', '.join(running) or 'no runtime'}")
    return {
        "quickstart": _command(onnxruntime, untrained, client, server),
        **{
            f"build --runtime {name}": _command(_install(name, ability.why_not_build)) for name, ability in able.items()
        },
        "run, bench": runs,
        "package": _command(client),
        "serve": _command(server),
        "validate --plan": runs,
        "validate --url": _command(client),
        "train": _command(untrained),
    }


def problems(machine: Machine, able: dict[str, Ability]) -> list[Problem]:
    """Return everything that does not fit together; a library that is not installed is no problem by itself."""
    return [
        *_broken_libraries(machine),
        *_driver_problems(machine),
        *_cuda_mismatches(machine),
        *_rtx_problems(machine, able),
        *_server_problems(machine),
        *_cache_problems(machine),
    ]


def cuda_obstacle(machine: Machine) -> str:
    """Return why no plan of a GPU can run here; empty if one can."""
    driver, cuda_python = machine.driver, machine.library("cuda-python")
    if not driver.gpus:
        if driver.failure:
            return "the NVIDIA driver does not answer"
        return "there is a driver, but no GPU" if driver.cuda or driver.version else "there is no NVIDIA driver"
    if cuda_python.state != "ok":
        return f"cuda-python is {cuda_python.state}"
    if driver.found_by != "cuda-python":
        return f"cuda-python cannot use the GPU: {driver.detail or 'it gives no reason'}"
    return ""


def _onnxruntime(library: Library) -> Ability:
    reason = _state(library)
    return Ability(build=not reason, run=not reason, why_not_build=reason, why_not_run=reason)


def _tensorrt(machine: Machine) -> Ability:
    library = machine.library("tensorrt")
    reason = _state(library) or cuda_obstacle(machine) or library.builder_error
    return Ability(build=not reason, run=not reason, why_not_build=reason, why_not_run=reason)


def _tensorrt_rtx(machine: Machine) -> Ability:
    library = machine.library("tensorrt-rtx")
    build = _state(library) or library.builder_error
    run = _state(library) or cuda_obstacle(machine)
    targets = ",".join(RTX_TARGETS)
    if not run and not is_target(machine.driver.gpus[0].capability, targets):
        gpu = machine.driver.gpus[0]
        run = f"it has no kernels for {gpu.name} (compute capability {gpu.capability}; it targets {targets})"
    return Ability(build=not build, run=not run, why_not_build=build, why_not_run=run)


def _state(library: Library) -> str:
    return {"ok": "", "missing": "not installed", "broken": "installed but broken"}[library.state]


def _absent(machine: Machine, *names: str) -> str:
    absent = [name for name in names if machine.library(name).state != "ok"]
    if not absent:
        return ""
    return f"{', '.join(absent)}: pip install 'trtdeploy[{EXTRAS[absent[0]]}]'"


def _install(name: str, reason: str) -> str:
    """Add the command that installs a runtime where that is what is lacking."""
    return (
        f"{name}: pip install 'trtdeploy[{EXTRAS[name]}]'" if reason == "not installed" and name in EXTRAS else reason
    )


def _command(*lacks: str) -> Command:
    reasons = list(dict.fromkeys(filter(None, lacks)))
    return Command(works=not reasons, note="; ".join(reasons))


def _broken_libraries(machine: Machine) -> Iterator[Problem]:
    core = machine.library("onnxruntime")
    if core.state == "missing":
        yield Problem(
            what="ONNX Runtime, which trtdeploy itself needs, is not installed.", mend="pip install onnxruntime"
        )
    for name, library in machine.libraries.items():
        if library.state == "broken":
            version = f"=={library.version}" if library.version else ""
            what = f"{TITLES.get(name, name)} is installed but does not work: {library.detail}."
            if name in ("tensorrt", "tensorrt-rtx") and ".so" in library.detail:
                what += " The Python bindings are there and the libraries that they load are not."
            yield Problem(what=what, mend=f"pip install --force-reinstall '{name}{version}'")
        if library.state == "ok" and library.builder_error and (name == "tensorrt-rtx" or not cuda_obstacle(machine)):
            yield Problem(
                what=f"{TITLES[name]} {library.version} imports but makes no builder: {library.builder_error}.",
                mend=f"pip install --force-reinstall '{name}=={library.version}'",
            )
    version = machine.library("tensorrt").version or ""
    if machine.library("tensorrt").state == "ok" and numbers(version)[:2] < (10, 3):
        yield Problem(
            what=f"TensorRT {version} is too old: 10.3 or later is needed.", mend="pip install 'tensorrt>=10.3'"
        )


def _driver_problems(machine: Machine) -> Iterator[Problem]:
    driver, cuda_python = machine.driver, machine.library("cuda-python")
    wants_gpu = any(machine.library(name).state == "ok" for name in ("tensorrt", "tensorrt-rtx"))
    if driver.failure:
        yield Problem(
            what=f"An NVIDIA driver is installed, but it does not answer: {driver.failure}.",
            mend="Load it: sudo modprobe nvidia. If that fails, install it again for the running kernel.",
        )
    if not driver.gpus:
        return
    if cuda_python.state == "missing" and wants_gpu:
        yield Problem(
            what=f"There is a GPU ({driver.gpus[0].name}), but cuda-python, by which plans are run, is not installed.",
            mend=f"pip install 'cuda-python=={_major(driver.cuda) or 13}.*'",
        )
    if cuda_python.state != "ok":
        return
    if numbers(cuda_python.version or "")[:2] < _OLDEST_CUDA_PYTHON:
        yield Problem(
            what=f"cuda-python {cuda_python.version} is too old: 12.9 or later is needed.",
            mend=f"pip install 'cuda-python=={_major(driver.cuda) or 13}.*'",
        )
    built_for, supported = _major(cuda_python.version), _major(driver.cuda)
    if built_for and supported and built_for > supported:
        yield Problem(
            what=f"cuda-python {cuda_python.version} needs a driver for CUDA {built_for}; {_driver(driver)} supports "
            f"CUDA {driver.cuda}.",
            mend=f"{_update_driver(built_for)}, or: pip install 'cuda-python=={supported}.*'",
        )
    elif driver.found_by == "nvidia-smi":
        yield Problem(
            what=f"nvidia-smi shows {driver.gpus[0].name}, but CUDA cannot use it: {driver.detail or 'no reason'}.",
            mend="Look at CUDA_VISIBLE_DEVICES and at the driver: nvidia-smi",
        )


def _cuda_mismatches(machine: Machine) -> Iterator[Problem]:
    driver, cuda_python = machine.driver, machine.library("cuda-python")
    for name in ("tensorrt", "tensorrt-rtx"):
        library = machine.library(name)
        built_for, supported = _major(library.cuda), _major(driver.cuda)
        if library.state != "ok" or not built_for:
            continue
        title = f"{TITLES[name]} {library.version}"
        bindings = _major(cuda_python.version)
        if driver.gpus and supported and built_for > supported:
            # TensorRT 10 is built for CUDA 12, too
            instead = ", or: pip install 'tensorrt-cu12==10.*'" if (name, supported) == ("tensorrt", 12) else ""
            yield Problem(
                what=f"{title} was built for CUDA {built_for}; {_driver(driver)} supports CUDA {driver.cuda}.",
                mend=f"{_update_driver(built_for)}{instead}",
            )
        elif cuda_python.state == "ok" and bindings and bindings != built_for:
            yield Problem(
                what=f"{title} was built for CUDA {built_for}, cuda-python {cuda_python.version} for CUDA {bindings}.",
                mend=f"pip install 'cuda-python=={built_for}.*'",
            )


def _rtx_problems(machine: Machine, able: dict[str, Ability]) -> Iterator[Problem]:
    reason = able["tensorrt-rtx"].why_not_run
    if reason.startswith("it has no kernels") and not able["tensorrt"].run:
        yield Problem(
            what=f"TensorRT-RTX {machine.library('tensorrt-rtx').version} cannot run plans here: {reason}.",
            mend="pip install 'trtdeploy[tensorrt]'",
        )


def _server_problems(machine: Machine) -> Iterator[Problem]:
    carried, installed = machine.server.tensorrt, machine.library("tensorrt")
    if carried and installed.state == "ok" and installed.version != carried:
        known = [release for release, version in TENSORRT_OF_RELEASE.items() if version == installed.version]
        instead = f", or serve with Triton {known[-1]}" if known else ""
        yield Problem(
            what=f"This tritonserver carries TensorRT {carried} and loads plans of that version only; TensorRT "
            f"{installed.version} is installed for building.",
            mend=f"pip install 'tensorrt=={carried}'{instead}",
        )


def _cache_problems(machine: Machine) -> Iterator[Problem]:
    if not machine.cache.writable:
        yield Problem(
            what=f"The cache folder {machine.cache.path} cannot be written: {machine.cache.detail}.",
            mend="export TRTDEPLOY_CACHE=FOLDER",
        )


def _driver(driver: Driver) -> str:
    return f"driver {driver.version}" if driver.version else "this driver"


def _update_driver(cuda: int) -> str:
    oldest = _OLDEST_DRIVER.get(cuda)
    return f"Install driver {oldest} or later" if oldest else f"Install a driver for CUDA {cuda}"


def _major(version: str | None) -> int | None:
    found = numbers(version or "")
    return found[0] if found else None
