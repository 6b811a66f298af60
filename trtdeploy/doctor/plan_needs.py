"""What a plan needs, whether this machine has it, and which Triton containers can load it."""

from __future__ import annotations

from pathlib import Path

from trtdeploy.doctor.judgement import TITLES, Ability
from trtdeploy.doctor.machine import Machine
from trtdeploy.doctor.triton_releases import TENSORRT_OF_RELEASE, numbers, releases_for
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.plan import Manifest, read_manifest
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets
from trtdeploy.runtimes.tensorrt.runtime import is_target as is_target


class PlanNeeds(FrozenModel):
    """The needs of one plan.

    Attributes:
        file: The plan.
        needs: Runtime, exact version and device, for people.
        obstacle: Why it does not run here; empty if it does.
        mend: What to do about that.
        triton: Which Triton containers load it.
        precision: What its layers are asked for, shown to run in, and what is not known; empty where none were counted.
    """

    file: str
    needs: str
    runs_here: bool
    obstacle: str
    mend: str
    triton: str
    precision: str


def needs_of(path: Path, machine: Machine, able: dict[str, Ability]) -> PlanNeeds:
    """Compare a plan's manifest with the machine; the plan itself is not opened.

    Raises:
        PlanCorruptError: It has no readable manifest.
    """
    manifest = read_manifest(path)
    runtime, device = manifest.runtime, manifest.device
    where = f"{device.name} ({device.capability})" if device.kind == "cpu" else _gpu(manifest)
    obstacle, mend = _obstacle(manifest, machine, able)
    return PlanNeeds(
        file=str(path),
        needs=f"{TITLES[runtime.name]} {runtime.version} on {where}",
        runs_here=not obstacle,
        obstacle=obstacle,
        mend=mend,
        triton=_triton(manifest),
        precision=manifest.precision.shares,
    )


def _gpu(manifest: Manifest) -> str:
    device = manifest.device
    built_on = (
        "" if "," in device.capability else f", built on {device.name}"
    )  # several: built for no GPU in particular
    return f"a GPU of compute capability {device.capability.replace(',', ', ')}{built_on}"


def _obstacle(manifest: Manifest, machine: Machine, able: dict[str, Ability]) -> tuple[str, str]:
    runtime, device = manifest.runtime, manifest.device
    again = f"trtdeploy build {manifest.onnx.file} -o PLAN --runtime {runtime.name}"
    library = machine.library(runtime.name)
    install = f"pip install '{runtime.name}=={runtime.version}'"
    if library.state != "ok":
        return f"{TITLES[runtime.name]} is {library.state} here", install
    if not _same_version(manifest, library.version or ""):
        return f"{TITLES[runtime.name]} {library.version} is installed here", f"{install}, or {again}"
    if device.kind == "cpu":
        here = instruction_sets()
        if device.capability not in (here, here.split("+")[0]):
            return f"this processor has {here}", again
        return "", ""
    gpus = machine.driver.gpus
    if gpus and not is_target(gpus[0].capability, device.capability):
        return f"{gpus[0].name} has compute capability {gpus[0].capability}", again
    if not able[runtime.name].run:
        reason = able[runtime.name].why_not_run
        return reason, "Run it on a machine with such a GPU." if not gpus else "See the problems below."
    return "", ""


def _same_version(manifest: Manifest, installed: str) -> bool:
    if manifest.runtime.version == installed:
        return True
    return _version_compatible(manifest) and numbers(installed) >= numbers(manifest.runtime.version)


def _version_compatible(manifest: Manifest) -> bool:
    return bool(manifest.build_config.get("version_compatible"))


def _triton(manifest: Manifest) -> str:
    runtime = manifest.runtime
    if runtime.name == "onnxruntime":
        return f"any release, by its Python backend with trtdeploy and onnxruntime {runtime.version} installed there"
    if runtime.name == "tensorrt-rtx":
        return "none: Triton has no backend for TensorRT-RTX"
    releases = releases_for(runtime.version, version_compatible=_version_compatible(manifest))
    if not releases:
        known = ", ".join(f"{release} ({version})" for release, version in TENSORRT_OF_RELEASE.items())
        return f"none is known to carry TensorRT {runtime.version}; known are {known}"
    containers = ", ".join(f"nvcr.io/nvidia/tritonserver:{release}-py3" for release in releases)
    return f"{containers}{' and later' if _version_compatible(manifest) else ''}"
